"""Losses on the kept logits, and the teacher's choice as a label, against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import PADDED, V, make_targets, normal
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses import Knowledge, Loss, StudentOutputs
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.kept import KeptLoss, LogitMSE, Ranking
from pipeline.losses.labels import CrossEntropy, PseudoLabel
from pipeline.targets import Targets

seeds = st.integers(0, 10_000)
each = pytest.mark.parametrize(
    "loss", [LogitMSE(), Ranking(), Ranking(form="hinge")], ids=["mse", "logistic", "hinge"]
)


def value(loss: Loss, student: Tensor, targets: Targets) -> Tensor:
    knowledge = Knowledge(targets, targets.label_ids)
    return loss.per_position(StudentOutputs(student), knowledge, nn.ModuleDict())


@each
@given(seed=seeds, shift=st.floats(-50, 50))
def test_a_shift_of_all_logits_of_a_position_changes_nothing(
    loss: KeptLoss, seed: int, shift: float
) -> None:
    student, targets = normal(seed, 4, V), make_targets(normal(seed + 1, 4, V), 4)
    torch.testing.assert_close(
        value(loss, student + shift, targets), value(loss, student, targets), rtol=1e-9, atol=1e-9
    )


@each
def test_only_kept_classes_have_a_gradient(loss: KeptLoss) -> None:
    targets = make_targets(normal(0, 5, V), 3)
    student = normal(1, 5, V).requires_grad_()
    (grad,) = torch.autograd.grad(value(loss, student, targets).sum(), student)
    assert torch.count_nonzero(grad.scatter(1, targets.ids, 0.0)) == 0
    assert torch.count_nonzero(grad) > 0


@each
def test_padding_of_a_short_row_is_no_entry(loss: KeptLoss) -> None:
    targets, student = make_targets(normal(0, 3, V), 3), normal(1, 3, V)
    padded = Targets(
        **{
            **vars(targets),
            "ids": torch.cat([targets.ids, torch.zeros(3, 2, dtype=torch.int64)], dim=1),
            "logits": torch.cat([targets.logits, torch.full((3, 2), -torch.inf)], dim=1),
        }
    )
    torch.testing.assert_close(value(loss, student, padded), value(loss, student, targets))


@each
def test_a_cache_of_draws_alone_is_refused(loss: KeptLoss) -> None:
    with pytest.raises(ConfigError, match="kept classes are needed, the cache holds draws alone"):
        value(loss, normal(0, 2, V), make_targets(normal(1, 2, V), 0, draws=2))


@given(seeds, st.integers(1, V))
def test_the_mean_squared_difference_is_that_of_centred_logits(seed: int, kept: int) -> None:
    teacher, student = normal(seed, 4, V), normal(seed + 1, 4, V)
    targets = make_targets(teacher, kept)
    sides = (logits.gather(1, targets.ids) for logits in (teacher, student))
    mine, theirs = (side - side.mean(dim=1, keepdim=True) for side in sides)
    torch.testing.assert_close(
        value(LogitMSE(), student, targets), (mine - theirs).square().mean(dim=1)
    )
    assert value(LogitMSE(), teacher, targets).abs().max() < 1e-20


def test_the_forward_kl_at_a_high_temperature_is_half_the_mean_squared_difference() -> None:
    teacher, student = normal(0, 4, V), normal(1, 4, V)
    targets = make_targets(teacher, V, temperatures=(1.0, 1000.0))
    hot = value(ForwardKL(temperature=1000.0), student, targets)
    torch.testing.assert_close(2 * hot, value(LogitMSE(), student, targets), rtol=1e-2, atol=0.0)


@given(seeds, st.integers(2, V), st.sampled_from(["logistic", "hinge"]))
def test_the_ranking_is_the_mean_over_all_pairs_of_the_teachers_first_classes(
    seed: int, depth: int, form: str
) -> None:
    teacher, student = normal(seed, 3, V), normal(seed + 1, 3, V)
    loss = Ranking(form=form, depth=depth, margin=0.5)
    for row, found in enumerate(value(loss, student, make_targets(teacher, V)).tolist()):
        order = teacher[row].argsort(descending=True)[:depth].tolist()
        pairs = [(a, b) for place, a in enumerate(order) for b in order[place + 1 :]]
        gaps = torch.stack([student[row, a] - student[row, b] for a, b in pairs])
        losses = (0.5 - gaps).clamp(min=0) if form == "hinge" else (1 + (-gaps).exp()).log()
        assert found == pytest.approx(float(losses.mean()))


def test_a_student_in_the_teachers_order_with_clear_gaps_has_nothing_to_learn() -> None:
    teacher = normal(0, 4, V)
    targets = make_targets(teacher, V)
    assert value(Ranking(form="hinge"), 1e4 * teacher, targets).tolist() == [0.0] * 4
    assert value(Ranking(), 1e4 * teacher, targets).max() < 1e-9
    assert (value(Ranking(), -teacher, targets) > value(Ranking(), teacher, targets)).all()


def test_classes_that_the_teacher_does_not_tell_apart_are_no_pair() -> None:
    teacher = torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[5.0, -5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = value(Ranking(), student, make_targets(teacher, 3))
    softplus = math.log1p(math.exp(5.0))
    assert float(found.detach()) == pytest.approx((softplus - 5.0 + softplus) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("kept", "draws"), [(3, 0), (0, 4)])
def test_a_pseudo_label_is_the_teachers_first_choice_among_what_is_known(
    kept: int, draws: int, smoothing: float
) -> None:
    teacher, student = normal(0, 5, V, scale=3.0), normal(1, 5, PADDED)
    targets = make_targets(teacher, kept, draws)
    known = torch.full_like(teacher, -torch.inf).scatter(1, targets.ids, targets.logits)
    known = known.scatter(1, targets.draw_ids, targets.draw_logits)
    expected = functional.cross_entropy(
        student[:, :V], known.argmax(dim=1), reduction="none", label_smoothing=smoothing
    )
    found = value(PseudoLabel(label_smoothing=smoothing), student, targets)
    torch.testing.assert_close(found, expected)


def test_a_pseudo_label_needs_no_label() -> None:
    targets = make_targets(normal(0, 3, V), 3)
    student = normal(1, 3, V)
    labelled = Knowledge(targets, targets.first_choice()[0])
    expected = CrossEntropy().per_position(StudentOutputs(student), labelled, nn.ModuleDict())
    torch.testing.assert_close(value(PseudoLabel(), student, targets), expected)


@pytest.mark.parametrize("loss", [LogitMSE(), Ranking(), PseudoLabel()])
def test_a_model_without_a_teacher_is_told_so(loss: Loss) -> None:
    with pytest.raises(ConfigError, match="targets are needed, found none; give a cache"):
        knowledge = Knowledge(None, torch.zeros(2, dtype=torch.int64))
        loss.per_position(StudentOutputs(normal(0, 2, V)), knowledge, nn.ModuleDict())
