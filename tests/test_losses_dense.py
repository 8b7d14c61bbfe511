"""Every divergence from sparse targets against its dense formula: bound, equality, estimate.

The formulas are written from the papers, over all V classes, with no regard for digits.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import V, describe, make_targets, normal
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
)
from pipeline.targets import Targets

temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
seeds = st.integers(0, 10_000)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(dim=1)


def js(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


DENSE: list[tuple[Divergence, Callable[[Tensor, Tensor], Tensor]]] = [
    (ForwardKL(), kl),
    (ReverseKL(), lambda p, q: kl(q, p)),
    (JensenShannon(), lambda p, q: js(p, q, 0.5)),
    (JensenShannon(beta=0.1), lambda p, q: js(p, q, 0.1)),
    (JensenShannon(beta=0.9), lambda p, q: js(p, q, 0.9)),
    (SkewKL(), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    (SkewKL(alpha=0.6), lambda p, q: kl(p, 0.6 * p + 0.4 * q)),
    (SkewKL(reverse=True), lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    (SkewKL(alpha=0.6, reverse=True), lambda p, q: kl(q, 0.4 * p + 0.6 * q)),
    (TotalVariation(), lambda p, q: (p - q).abs().sum(dim=1) / 2),
]
each = pytest.mark.parametrize(
    ("loss", "formula"), DENSE, ids=[describe(loss) for loss, _ in DENSE]
)
from_draws = pytest.mark.parametrize(
    ("loss", "formula"),
    [(loss, formula) for loss, formula in DENSE if loss.name != "reverse_kl"],
    ids=[describe(loss) for loss, _ in DENSE if loss.name != "reverse_kl"],
)


def value(loss: Divergence, student: Tensor, targets: Targets, **changes: object) -> Tensor:
    loss = loss.model_copy(update=changes)
    knowledge = Knowledge(targets, targets.label_ids)
    return loss.per_position(StudentOutputs(student), knowledge, nn.ModuleDict())


def dense(
    loss: Divergence, formula: Callable, teacher: Tensor, student: Tensor, temperature: float
) -> Tensor:
    power = 1 if loss.name == "total_variation" else 2
    p, q = (teacher / temperature).softmax(dim=1), (student / temperature).softmax(dim=1)
    return temperature**power * formula(p, q)


def gradient(values: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return grad


@each
@given(seed=seeds, scale=st.sampled_from([0.1, 2.0, 10.0]), temperature=st.sampled_from([1.0, 4.0]))
@settings(max_examples=15)
def test_the_bucket_bounds_the_dense_value_from_below_and_grows_to_it_with_k(
    loss: Divergence, formula: Callable, seed: int, scale: float, temperature: float
) -> None:
    teacher, student = normal(seed, 5, V, scale=scale), normal(seed + 1, 5, V, scale=scale)
    whole = dense(loss, formula, teacher, student, temperature)
    below = torch.zeros_like(whole)
    for kept in range(V + 1):
        targets = make_targets(teacher, kept)
        found = value(loss, student, targets, tail="bucket", temperature=temperature)
        if loss.name != "reverse_kl" or (targets.at(temperature).tail_mass > 1e-7).all():
            assert (found >= below - 1e-9 * (1.0 + whole)).all()
        below = found
    torch.testing.assert_close(below, whole)


@each
@temperatures
def test_with_every_class_kept_value_and_gradient_are_those_of_the_dense_formula(
    loss: Divergence, formula: Callable, temperature: float
) -> None:
    teacher, student = normal(0, 5, V, scale=3.0), normal(1, 5, V, scale=3.0).requires_grad_()
    expected = dense(loss, formula, teacher, student, temperature)
    slope = gradient(expected, student)
    tails = ["bucket"] if loss.name == "reverse_kl" else ["auto", "bucket", "draws", "renormalise"]
    for tail in tails:
        found = value(loss, student, make_targets(teacher, V), tail=tail, temperature=temperature)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, student), slope)


@from_draws
@temperatures
@pytest.mark.parametrize(("kept", "draws"), [(0, 1), (2, 2)])
def test_the_mean_over_all_possible_draws_is_the_dense_value_and_its_gradient(
    loss: Divergence, formula: Callable, temperature: float, kept: int, draws: int
) -> None:
    teacher, student = normal(2, 1, V, scale=2.0), normal(3, 1, V, scale=2.0).requires_grad_()
    head = make_targets(teacher, kept)
    tail = teacher.softmax(dim=1).scatter(1, head.ids, 0.0)
    tail = tail[0] / tail.sum()
    outcomes = torch.tensor(list(product(tail.nonzero()[:, 0].tolist(), repeat=draws)))
    chance = tail[outcomes].prod(dim=1)
    every_outcome = Targets(
        **{
            **vars(head.select(torch.zeros(len(outcomes), dtype=torch.int64))),
            "draw_ids": outcomes,
            "draw_logits": teacher[0][outcomes],
        }
    )
    student_rows = student.expand(len(outcomes), -1)
    found = chance @ value(loss, student_rows, every_outcome, tail="draws", temperature=temperature)
    expected = dense(loss, formula, teacher, student, temperature)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student))


@each
@given(seed=seeds, temperature=st.sampled_from([1.0, 2.0, 4.0]))
@settings(max_examples=15)
def test_it_vanishes_where_the_student_is_the_teacher(
    loss: Divergence, formula: Callable, seed: int, temperature: float
) -> None:
    teacher = normal(seed, 4, V, scale=3.0)
    targets = make_targets(teacher, 3, draws=4)
    for tail in ["bucket"] if loss.name == "reverse_kl" else ["bucket", "draws"]:
        found = value(loss, teacher, targets, tail=tail, temperature=temperature)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0.0, atol=1e-6)


@each
@temperatures
def test_the_gradient_keeps_its_size_over_temperatures(
    loss: Divergence, formula: Callable, temperature: float
) -> None:
    """Near uniform it is the same at every temperature (Hinton et al. 2015)."""
    teacher, student = normal(0, 3, V, scale=0.01), normal(1, 3, V, scale=0.01).requires_grad_()
    targets = make_targets(teacher, V)
    found = gradient(value(loss, student, targets, temperature=temperature), student)
    expected = gradient(value(loss, student, targets), student)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-4)


def test_the_limits_of_the_mixtures_are_the_two_kls() -> None:
    teacher, student = normal(0, 5, V), normal(1, 5, V)
    targets = make_targets(teacher, 3)
    near = 1e-6
    forward, reverse = (value(loss, student, targets) for loss in (ForwardKL(), ReverseKL()))
    pairs = [
        (value(SkewKL(alpha=near), student, targets), forward),
        (value(SkewKL(alpha=near, reverse=True), student, targets), reverse),
        (value(JensenShannon(beta=near), student, targets) / near, forward),
        (value(JensenShannon(beta=1 - near), student, targets) / near, reverse),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [SkewKL(), SkewKL(reverse=True), JensenShannon(beta=0.2)])
def test_a_draw_that_the_student_believes_far_more_than_the_teacher_has_a_bounded_weight(
    loss: Divergence,
) -> None:
    teacher = torch.zeros(1, V, dtype=torch.float64)
    teacher[0, 3:] = -20.0
    student = torch.zeros(1, V, dtype=torch.float64)
    student[0, 3:] = 20.0
    found = value(loss, student, make_targets(teacher, 3, draws=2), tail="draws")
    assert 0.0 < float(found) < 60.0


def test_the_reverse_kl_of_a_teacher_that_is_sure_is_finite() -> None:
    teacher = torch.tensor([[0.0, -200.0, -200.0, -200.0]])
    student = torch.tensor([[-5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    found = value(ReverseKL(), student, make_targets(teacher, 1))
    assert 10.0 < float(found.detach()) < 17.0
    assert gradient(found, student).isfinite().all()


def test_draws_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"skew_kl: tail: draws, but the cache holds no draws"):
        value(SkewKL(), normal(0, 2, V), make_targets(normal(1, 2, V), 3), tail="draws")
