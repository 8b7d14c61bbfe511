"""A step of training: what is summed, what it is divided by, and what reaches the weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import relates_rows
from small_worlds import (
    HEADS,
    SIGNALS,
    TASK,
    KeepGradients,
    ask,
    assert_close,
    every_loss,
    gradients,
    make_example,
    make_student,
    make_trainer,
    name_loss,
    weights,
)
from torch.nn import functional

from pipeline.batches import Collator
from pipeline.errors import NumericalError
from pipeline.examples import CachedExample
from pipeline.losses import LOSSES, Loss, Schedule
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.losses.labels import CrossEntropy
from pipeline.outputs import run_student
from pipeline.terms import attach_projections, name_terms, projections_of, sum_terms
from pipeline.trainer import DistillationTrainer

LOSS_CASES = pytest.mark.parametrize("loss", every_loss(), ids=name_loss)
DIVISIBLE_LOSSES = pytest.mark.parametrize(
    "loss",
    [loss for loss in every_loss() if not relates_rows(loss) or loss.unit != "examples"],
    ids=name_loss,
)
SPLITS = ((8, 1), (4, 2), (2, 4))  # examples of a micro-batch, micro-batches of a step


@pytest.fixture(scope="module")
def examples() -> list[CachedExample]:
    return [make_example(number) for number in range(8)]


def step_gradient(
    folder: Path, losses: Sequence[Loss], examples: Sequence[CachedExample], **training: object
) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over all examples."""
    kept = KeepGradients()
    settings = {"per_device_train_batch_size": len(examples), "max_steps": 1, **training}
    make_trainer(folder, losses, examples, callbacks=[kept], **settings).train()
    return kept.steps[0]


@DIVISIBLE_LOSSES
def test_gradients_do_not_depend_on_the_split_into_micro_batches(
    tmp_path: Path, examples: list[CachedExample], loss: Loss
) -> None:
    found = [
        step_gradient(
            tmp_path,
            [loss],
            examples,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
        )
        for size, count in (SPLITS[0], SPLITS[-1])
    ]
    assert max(float(g.norm()) for g in found[0].values()) > 0
    for other in found[1:]:
        assert_close(other, found[0], 1e-5)


def test_weights_do_not_depend_on_the_split_even_where_the_last_step_is_short(
    tmp_path: Path,
) -> None:
    examples = [make_example(number) for number in range(21)]  # 8, 8, 5
    losses = [ForwardKL(weight=0.7, temperature=2.0), CrossEntropy(), HiddenMSE(layers={1: -1})]
    found = []
    for size, count in SPLITS:
        trainer = make_trainer(
            tmp_path,
            losses,
            examples,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            num_train_epochs=2,
        )
        trainer.train()
        assert trainer.state.global_step == 6
        found.append(weights(trainer.model))
    for other in found[1:]:
        assert_close(other, found[0], 1e-5)


def _state_above(signal: str) -> int:
    """The last hidden state that a signal is made from."""
    kind, _, layer = signal.partition(".")
    return int(layer or "-1") - (kind in ("query", "key", "value"))


@LOSS_CASES
def test_masked_and_padded_positions_have_no_gradient_at_all(
    examples: list[CachedExample], loss: Loss
) -> None:
    model = make_student()
    attach_projections(model, [loss], dict.fromkeys(SIGNALS, 6))
    batch = Collator(TASK, 0, SIGNALS, HEADS)(examples)
    states = HiddenMSE(layers={0: 0})  # asks for them
    outputs, student = run_student(model, batch, [loss, states], TASK)
    watched = [outputs.logits] if loss.unit in ("targets", "labels") else []
    if loss.compares:
        depth = len(outputs.hidden_states)
        above = {_state_above(signal) % depth for signal in loss.compares}
        watched = [outputs.hidden_states[max(above)]]
    for tensor in watched:
        tensor.retain_grad()
    sum_terms([loss], student, batch, projections_of(model))[0].backward()
    counts = batch["token_mask"].flatten().clone()
    if loss.unit != "examples":
        counts = torch.zeros_like(counts)
        labelled = batch["label_ids"] >= 0
        chosen = labelled if loss.unit == "labels" else torch.ones_like(labelled)
        counts[batch["target_index"][chosen]] = True
    for tensor in watched:
        moved = tensor.grad.flatten(0, 1).abs().sum(dim=1)
        assert not moved[~counts].any()
        assert moved[counts].any() if relates_rows(loss) else (moved[counts] > 0).all()


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=4))
@settings(max_examples=25)
def test_a_partly_masked_step_is_the_mean_of_what_counts_and_an_empty_one_is_zero(
    small_trainer: DistillationTrainer, counts: list[int]
) -> None:
    examples = [make_example(number, targets=count) for number, count in enumerate(counts)]
    collate = small_trainer.data_collator
    batches, total = small_trainer.get_batch_samples(
        iter([collate([example]) for example in examples]), len(examples), torch.device("cpu")
    )
    losses = [
        small_trainer.compute_loss(small_trainer.model, batch, num_items_in_batch=total)
        for batch in batches
    ]
    small_trainer.model.zero_grad()
    sum(losses).backward()
    found = float(sum(losses).detach())
    whole = float(small_trainer.compute_loss(small_trainer.model, collate(examples)).detach())
    assert found == pytest.approx(whole, rel=1e-5)
    assert (found == 0.0) == (sum(counts) == 0)
    for gradient in gradients(small_trainer.model).values():
        assert torch.isfinite(gradient).all()


@pytest.fixture(scope="module")
def small_trainer(tmp_path_factory: pytest.TempPathFactory) -> DistillationTrainer:
    losses = [ForwardKL(tail="bucket"), CrossEntropy(weight=0.5), HiddenMSE(layers={1: -1})]
    return make_trainer(tmp_path_factory.mktemp("run"), losses, [make_example(0)])


def test_a_fully_masked_run_leaves_the_weights_alone(tmp_path: Path) -> None:
    examples = [make_example(number, targets=0) for number in range(4)]
    trainer = make_trainer(tmp_path, [CrossEntropy(), ForwardKL()], examples, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert [line["loss"] for line in read_lines(tmp_path)] == [0.0, 0.0]


def dense_kl(model: torch.nn.Module, examples: Sequence[CachedExample], T: float) -> torch.Tensor:
    """Mean KL(teacher || student) at T over all targets, straight from the definition."""
    values = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        rows = model(input_ids=ids).logits[0, example.target_positions, :40] / T
        teacher = torch.empty_like(rows).scatter_(1, example.targets.ids, example.targets.logits)
        teacher = functional.log_softmax(teacher / T, dim=1)
        values.append((teacher.exp() * (teacher - functional.log_softmax(rows, dim=1))).sum(dim=1))
    return torch.cat(values).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_temperature_squared_scales_the_gradient_and_not_the_logged_term(
    tmp_path: Path, temperature: float
) -> None:
    examples = [make_example(number, top_k=40, tail_draws=0) for number in range(6)]
    found = step_gradient(tmp_path, [ForwardKL(temperature=temperature)], examples)
    model = make_student()
    by_hand = dense_kl(model, examples, temperature)
    (temperature**2 * by_hand).backward()
    assert_close(found, gradients(model), 1e-5)
    line = read_lines(tmp_path)[0]
    assert line["term/forward_kl"] == pytest.approx(float(by_hand.detach()), rel=1e-5)
    assert line["loss"] == pytest.approx(temperature**2 * float(by_hand.detach()), rel=1e-5)


def test_a_student_that_equals_its_teacher_has_no_divergence_and_the_teachers_own_loss() -> None:
    model = make_student(vocab_size=40).eval()
    example = ask(model, make_example(3))
    losses = [ForwardKL(temperature=2.0), CrossEntropy()]
    attach_projections(model, losses, {})
    batch = Collator(TASK, 0)([example])
    with torch.no_grad():
        _, student = run_student(model, batch, losses, TASK)
        kl, ce = sum_terms(losses, student, batch, projections_of(model))
        ids = batch["inputs"]["input_ids"]
        own = model(input_ids=ids, labels=ids).loss  # transformers shifts the labels by itself
        unshifted = functional.cross_entropy(student.logits, ids[0, :-1])
    assert float(kl) == pytest.approx(0.0, abs=1e-5)
    assert float(ce) / len(example.label_ids) == pytest.approx(float(own), rel=1e-5)
    assert abs(float(own) - float(unshifted)) > 1e-2
    said = -float(example.targets.label_log_probs.mean())
    assert said == pytest.approx(float(own), rel=1e-5)


def test_scheduled_weights_change_the_gradient_as_stated(
    tmp_path: Path, examples: list[CachedExample]
) -> None:
    kl = ForwardKL(weight=Schedule(start=0.9, end=0.1))
    ce = CrossEntropy(weight=Schedule(start=0.0, end=1.0, begin=0.5, until=1.0))
    trainer = make_trainer(tmp_path, [kl, ce], examples)
    batch = trainer.data_collator(examples)

    def gradient(losses: list[Loss], step: int) -> dict[str, torch.Tensor]:
        trainer.losses, trainer.state.global_step, trainer.state.max_steps = losses, step, 8
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        return gradients(trainer.model)

    alone = [gradient([ForwardKL(), CrossEntropy(weight=w)], 0) for w in (0.0, 1.0)]
    for step, (for_kl, for_ce) in {0: (0.9, 0.0), 4: (0.5, 0.0), 6: (0.3, 0.5)}.items():
        expected = {
            name: for_kl * alone[0][name] + for_ce * (alone[1][name] - alone[0][name])
            for name in alone[0]
        }
        assert_close(gradient([kl, ce], step), expected, 1e-5)


def read_lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_log_is_a_line_with_each_term_by_name(
    tmp_path: Path, examples: list[CachedExample]
) -> None:
    losses = [ForwardKL(weight=0.5, tail="bucket"), ForwardKL(temperature=2.0), CrossEntropy()]
    trainer = make_trainer(
        tmp_path,
        losses,
        examples,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        logging_steps=2,
    )
    trainer.train()
    lines = read_lines(tmp_path)
    assert [(line["step"], line["epoch"], line["split"]) for line in lines] == [
        (2, 1.0, "train"),
        (4, 2.0, "train"),
    ]
    assert lines[0]["seconds"] < lines[1]["seconds"]
    for line in lines:
        terms = [line[f"term/{name}"] for name in ("forward_kl", "forward_kl#2", "cross_entropy")]
        whole = 0.5 * terms[0] + 4 * terms[1] + terms[2]
        assert line["loss"] == pytest.approx(whole, rel=1e-5)


def test_terms_of_one_kind_are_numbered() -> None:
    losses = [ForwardKL(), CrossEntropy(), ForwardKL(temperature=2.0), ForwardKL()]
    names = ["forward_kl", "cross_entropy", "forward_kl#2", "forward_kl#3"]
    assert name_terms(losses) == names


def test_targets_survive_whatever_the_config_says_of_unused_columns(
    tmp_path: Path, examples: list[CachedExample]
) -> None:
    trainer = make_trainer(
        tmp_path, [ForwardKL()], examples, remove_unused_columns=True, max_steps=1
    )
    assert next(iter(trainer.get_train_dataloader()))["targets"].num_classes == 40
    trainer.train()
    assert read_lines(tmp_path)[0]["term/forward_kl"] > 0


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_term(tmp_path: Path) -> None:
    model = make_student()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    trainer = make_trainer(tmp_path, [CrossEntropy()], [make_example(0)], model)
    with pytest.raises(NumericalError, match=r"step 0: the loss is not finite \(cross_entropy nan"):
        trainer.train()


def test_projections_learn_beside_the_student(
    tmp_path: Path, examples: list[CachedExample]
) -> None:
    losses = [HiddenMSE(layers={1: -1}), LOSSES["hidden_cosine"](name="hidden_cosine", pooled=True)]
    trainer = make_trainer(tmp_path, losses, examples, max_steps=1)
    before = weights(projections_of(trainer.model))
    assert len(before) == 4  # a weight and a bias each
    trainer.train()
    after = weights(projections_of(trainer.model))
    assert not any(torch.equal(before[name], after[name]) for name in before)
