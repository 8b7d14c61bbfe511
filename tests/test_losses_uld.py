"""Sorted probabilities compared across class spaces, against the definition."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import V, make_targets, normal
from small_worlds import KeepGradients, assert_close, make_example, make_student, make_trainer
from small_worlds import V as VOCABULARY
from torch import Tensor, nn

from pipeline.errors import ConfigError, ModelError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.uld import ULD
from pipeline.targets import Targets

seeds = st.integers(0, 10_000)
widths = st.integers(2, 2 * V)


def value(loss: ULD, student: Tensor, targets: Targets) -> Tensor:
    knowledge = Knowledge(targets, targets.label_ids)
    return loss.per_position(StudentOutputs(student), knowledge, nn.ModuleDict())


def dense(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Sorted, filled up with zeros, compared (Boizard et al. 2024)."""
    length = max(teacher.shape[1], student.shape[1])
    sides = []
    for logits in (teacher, student):
        probs = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True).values
        sides.append(nn.functional.pad(probs, (0, length - probs.shape[1])))
    return temperature * (sides[0] - sides[1]).abs().sum(dim=1)


@given(seeds, widths, st.sampled_from([1.0, 2.0, 4.0]))
def test_with_every_class_kept_it_is_the_definition_for_any_number_of_the_students_classes(
    seed: int, width: int, temperature: float
) -> None:
    teacher = normal(seed, 4, V, scale=3.0)
    student = normal(seed + 1, 4, width, scale=3.0).requires_grad_()
    found = value(ULD(temperature=temperature), student, make_targets(teacher, V))
    expected = dense(teacher, student, temperature)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(values.sum(), student)[0] for values in (found, expected)]
    torch.testing.assert_close(*slopes)


@given(seeds, widths, st.integers(1, V))
def test_a_truncated_record_gives_a_lower_bound_at_most_twice_the_tail_below(
    seed: int, width: int, kept: int
) -> None:
    teacher, student = normal(seed, 4, V, scale=2.0), normal(seed + 1, 4, width, scale=2.0)
    targets = make_targets(teacher, kept)
    gap = dense(teacher, student) - value(ULD(), student, targets)
    assert (gap >= -1e-12).all()
    assert (gap <= 2.0 * targets.at(1.0).tail_mass + 1e-12).all()


@given(seeds, st.permutations(range(V)))
def test_which_class_has_a_probability_does_not_matter(seed: int, order: list[int]) -> None:
    teacher, student = normal(seed, 4, V), normal(seed + 1, 4, V)
    targets = make_targets(teacher, 3)
    found = value(ULD(), student[:, order], targets)
    torch.testing.assert_close(found, value(ULD(), student, targets))
    same = value(ULD(), teacher[:, order], targets)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0.0, atol=1e-12)


def test_rows_of_padding_count_as_classes_unless_their_number_is_said() -> None:
    teacher, student = normal(0, 4, V), normal(1, 4, V + 2)
    targets = make_targets(teacher, V)
    torch.testing.assert_close(value(ULD(), student, targets), dense(teacher, student))
    torch.testing.assert_close(
        value(ULD(num_classes=V), student, targets), dense(teacher, student[:, :V])
    )


def test_what_cannot_be_compared_is_refused() -> None:
    student, targets = normal(0, 2, V), make_targets(normal(1, 2, V), 3)
    with pytest.raises(ModelError, match="num_classes is 8, the student's head has 7 rows; give"):
        value(ULD(num_classes=8), student, targets)
    with pytest.raises(ConfigError, match="uld: kept classes are needed, the cache holds draws"):
        value(ULD(), student, make_targets(normal(1, 2, V), 0, draws=2))
    with pytest.raises(ConfigError, match="temperature 3: the cache holds"):
        value(ULD(temperature=3.0), student, targets)


def test_it_trains_a_student_of_another_vocabulary(tmp_path: Path) -> None:
    examples = [make_example(number, top_k=VOCABULARY, tail_draws=0) for number in range(4)]
    student = make_student(vocab_size=64)
    trainer = make_trainer(tmp_path, [ULD()], examples, student, max_steps=1)
    batch = trainer.data_collator(examples)
    with torch.no_grad():
        logits = student(**batch["inputs"]).logits.flatten(0, 1)[batch["target_index"]]
        loss = trainer.compute_loss(student, batch)
    expected = dense(batch["targets"].logits, logits).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    trainer.train()


def test_beside_it_no_head_is_fused(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(4)]
    losses = [ForwardKL(), ULD(num_classes=VOCABULARY)]
    found = []
    for terms in (losses, losses[:1], losses[1:]):
        kept = KeepGradients()
        make_trainer(tmp_path, terms, examples, callbacks=[kept], max_steps=1).train()
        found.append(kept.steps[0])
    both, one, other = found
    assert_close(both, {name: one[name] + other[name] for name in both}, 1e-4)
