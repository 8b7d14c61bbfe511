"""Positions that count differently: by how sure the teacher is, or not at all."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import V, make_targets, normal
from small_runs import TINY, make_student_config, make_topic_cache, read_lines
from small_worlds import KeepGradients, assert_close, make_example, make_trainer
from torch import Tensor, nn

from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError
from pipeline.losses import LOSSES, Knowledge, Loss, StudentOutputs
from pipeline.targets import Targets
from stages.train_student import train_student


def kl(**settings: object) -> Loss:
    return LOSSES["forward_kl"].model_validate({"tail": "bucket", **settings})


def value(loss: Loss, student: Tensor, targets: Targets) -> Tensor:
    knowledge = Knowledge(targets, targets.label_ids)
    return loss.per_position(StudentOutputs(student), knowledge, nn.ModuleDict())


def entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(dim=1)
    return -(p * p.log()).sum(dim=1)


@pytest.mark.parametrize("weight", ["confidence", "entropy", "certainty"])
def test_a_value_is_weighted_by_what_the_teacher_says_at_temperature_one(weight: str) -> None:
    teacher, student = normal(0, 5, V, scale=2.0), normal(1, 5, V)
    targets = make_targets(teacher, V)
    share = entropy(teacher) / math.log(V)
    confidence = teacher.softmax(dim=1).amax(dim=1)
    expected = {"confidence": confidence, "entropy": share, "certainty": 1.0 - share}[weight]
    loss = kl(temperature=2.0, positions={"weight": weight})
    found = loss.weights(Knowledge(targets, targets.label_ids))
    assert found is not None
    torch.testing.assert_close(found, expected)
    plain = value(kl(temperature=2.0), student, targets)
    torch.testing.assert_close(value(loss, student, targets), plain * expected)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"min_confidence": 0.9}, [True, False, False]),
        ({"max_confidence": 0.4}, [False, False, True]),
        ({"min_entropy": 1.0}, [False, False, True]),
        ({"max_entropy": 1.0}, [True, True, False]),
        ({"min_confidence": 0.4, "max_confidence": 0.9}, [False, True, False]),
    ],
)
def test_positions_out_of_bounds_count_nothing(keep: dict[str, float], kept: list[bool]) -> None:
    """A sure teacher, one that wavers between two classes, and one that does not know."""
    teacher = torch.full((3, V), -9.0, dtype=torch.float64)
    teacher[0, 0], teacher[1, :2], teacher[2] = 9.0, 9.0, 0.0
    loss = kl(positions={"keep": keep})
    student = normal(1, 3, V).requires_grad_()
    found = value(loss, student, make_targets(teacher, 3))
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert (found > 0).tolist() == kept
    assert grad.any(dim=1).tolist() == kept


def test_a_position_that_is_left_out_costs_nothing_however_wrong_the_student_is() -> None:
    teacher = torch.zeros(1, V, dtype=torch.float64)
    student = torch.full((1, V), -torch.inf, dtype=torch.float64)
    student[0, -1] = 0.0
    loss = kl(positions={"keep": {"min_confidence": 0.5}})
    assert value(loss, student, make_targets(teacher, 2)).tolist() == [0.0]


@given(st.integers(0, 10_000), st.sampled_from([0.5, 2.0, 8.0]), st.integers(1, V))
def test_the_entropy_of_a_truncated_record_is_a_lower_bound_that_grows_to_the_true_one(
    seed: int, scale: float, kept: int
) -> None:
    teacher = normal(seed, 4, V, scale=scale)
    true = entropy(teacher)
    found, more = (make_targets(teacher, k).at(1.0).entropy() for k in (kept, min(kept + 1, V)))
    assert (found <= more + 1e-9).all()
    assert (more <= true + 1e-9).all()
    torch.testing.assert_close(make_targets(teacher, V).at(1.0).entropy(), true)


def test_a_teacher_that_keeps_little_of_its_mass_is_not_taken_for_a_sure_one() -> None:
    teacher = 0.01 * normal(0, 3, 500)
    found = make_targets(teacher, 4).at(1.0).entropy()
    assert (found > 0.99 * math.log(500)).all()


def test_the_entropy_from_draws_is_unbiased() -> None:
    teacher = normal(0, 1, V, scale=2.0)
    targets = make_targets(teacher, 2, draws=20_000)
    found = targets.at(1.0).entropy()
    torch.testing.assert_close(found, entropy(teacher), rtol=0.02, atol=0.0)


def test_a_term_is_the_weighted_mean_over_the_step(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(6)]
    loss = kl(positions={"weight": "certainty", "keep": {"max_entropy": 2.0}})
    trainer = make_trainer(tmp_path, [loss, LOSSES["cross_entropy"](weight=0.0)], examples)
    batch = trainer.data_collator(examples)
    found = float(trainer.compute_loss(trainer.model, batch).detach())
    with torch.no_grad():
        logits = trainer.model(**batch["inputs"]).logits.flatten(0, 1)[batch["target_index"]]
    weights = loss.weights(Knowledge(batch["targets"], batch["label_ids"]))
    assert weights is not None
    assert 0 < int((weights > 0).sum()) < len(weights)
    plain = value(kl(), logits, batch["targets"])
    assert found == pytest.approx(float((plain * weights).sum() / weights.sum()), rel=1e-5)


def test_a_step_in_which_nothing_is_kept_is_zero(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(4)]
    loss = kl(positions={"keep": {"min_confidence": 1.0}})
    kept = KeepGradients()
    make_trainer(tmp_path, [loss], examples, callbacks=[kept], max_steps=1).train()
    assert not any(gradient.any() for gradient in kept.steps[0].values())


def test_filtered_positions_do_not_depend_on_the_split_into_micro_batches(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(8)]
    losses = [
        kl(positions={"keep": {"max_entropy": 2.0}}),
        LOSSES["cross_entropy"].model_validate({"positions": {"weight": "confidence"}}),
    ]
    found = []
    for size, count in ((8, 1), (2, 4)):
        kept = KeepGradients()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        make_trainer(tmp_path, losses, examples, callbacks=[kept], max_steps=1, **settings).train()
        found.append(kept.steps[0])
    assert_close(found[1], found[0], 1e-5)


def test_labels_without_a_cache_cannot_be_weighted_by_a_teacher() -> None:
    loss = LOSSES["cross_entropy"].model_validate({"positions": {"weight": "confidence"}})
    with pytest.raises(ConfigError, match="cross_entropy: a teacher's targets are needed"):
        loss.weights(Knowledge(None, torch.zeros(2, dtype=torch.int64)))


def test_the_trainer_steps_through_the_temperatures(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(4)]
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 4}
    stepped, plain = KeepGradients(), {1.0: KeepGradients(), 4.0: KeepGradients()}
    loss = kl(temperature={0.0: 4.0, 0.5: 1.0})
    make_trainer(
        tmp_path / "both", [loss], examples, callbacks=[stepped], max_steps=2, **settings
    ).train()
    for temperature, kept in plain.items():
        loss = kl(temperature=temperature)
        run = tmp_path / str(temperature)
        make_trainer(run, [loss], examples, callbacks=[kept], max_steps=1, **settings).train()
    for found, expected in zip(stepped.steps, (plain[4.0], plain[1.0]), strict=True):
        assert_close(found, expected.steps[0], 1e-6)
    logged = [line["term/forward_kl"] for line in read_lines(tmp_path / "both")]
    alone = [read_lines(tmp_path / name)[0]["term/forward_kl"] for name in ("4.0", "1.0")]
    assert logged == pytest.approx(alone, rel=1e-6)


def test_a_student_weights_classes_by_their_names(tmp_path: Path) -> None:
    cache = make_topic_cache(tmp_path)
    names = TeacherCache.open(cache).manifest.label_names
    assert names is not None
    terms = []
    for weights in ({names[0]: 9.0}, {0: 9.0}, {}):
        losses = [{"name": "cross_entropy", "class_weights": weights}]
        config = make_student_config(
            cache,
            tmp_path / f"run{len(terms)}",
            student={"from": "scratch", "architecture": "bert", **TINY},
            losses=losses,
            training={"max_steps": 1, "logging_steps": 1},
        )
        terms.append(read_lines(train_student(config))[0]["term/cross_entropy"])
    assert terms[0] == terms[1] != terms[2]
