"""Relations: what a method is blind to costs nothing, and no row is compared beyond its group."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CONFIGS, DOCUMENT, all_losses, describe, make_case, normal, relates_rows
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.losses import LOSSES, Knowledge, Loss, StudentOutputs
from pipeline.losses.relations import CKA, Gram, RelationLoss, RKDAngle, RKDDistance

MEMBERS: list[type[RelationLoss]] = [RKDDistance, RKDAngle, Gram, CKA]
every_relation = pytest.mark.parametrize("member", MEMBERS)
token_relations = pytest.mark.parametrize(
    "loss",
    [loss for loss in all_losses() if relates_rows(loss) and loss.unit == "features"],
    ids=describe,
)


def relate(loss: Loss, student: Tensor, teacher: Tensor, documents: Tensor | None = None) -> Tensor:
    (mine, theirs), *_ = loss.compares.items()
    outputs = StudentOutputs(torch.empty(0, 1), {mine: student})
    knowledge = Knowledge(None, torch.empty(0), {theirs: teacher}, documents)
    return loss.per_position(outputs, knowledge, nn.ModuleDict())


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(normal(3, width, width)).Q


def test_every_relation_is_tested_here() -> None:
    found = {type(loss) for loss in all_losses() if isinstance(loss, RelationLoss)}
    assert found == set(MEMBERS)
    assert {member.model_fields["name"].default for member in MEMBERS} <= set(CONFIGS) & set(LOSSES)


@every_relation
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10.0))
@settings(max_examples=15)
def test_a_rotated_and_scaled_teacher_costs_nothing_and_pulls_nowhere(
    member: type[RelationLoss], seed: int, scale: float
) -> None:
    mine = normal(seed, 5, 4).requires_grad_()
    wider = scale * mine.detach() @ rotation(6)[:4]
    found = relate(member(pooled=True), mine, wider)
    (grad,) = torch.autograd.grad(found.sum(), mine)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


@every_relation
def test_only_the_gram_matrix_sees_a_shift(member: type[RelationLoss]) -> None:
    mine = normal(0, 5, 4)
    found = relate(member(pooled=True), mine, mine + 3.0)
    assert bool((found.abs() < 1e-10).all()) == (member is not Gram)


@every_relation
@given(seed=st.integers(0, 1000), order=st.permutations(range(5)))
@settings(max_examples=15)
def test_values_move_with_their_rows(
    member: type[RelationLoss], seed: int, order: list[int]
) -> None:
    mine, theirs = normal(seed, 5, 3), normal(seed + 1, 5, 4)
    loss = member(pooled=True)
    found = relate(loss, mine, theirs)
    torch.testing.assert_close(relate(loss, mine[order], theirs[order]), found[order])
    assert (found > 0).all()


@every_relation
def test_a_group_too_small_to_relate_costs_nothing(member: type[RelationLoss]) -> None:
    mine = normal(0, 2, 3).requires_grad_()
    found = relate(member(layers={1: 1}), mine, normal(1, 2, 4), torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(found.sum(), mine)
    assert found.tolist() == [0.0, 0.0]
    assert not grad.any()


@every_relation
def test_rows_that_are_all_alike_have_finite_gradients(member: type[RelationLoss]) -> None:
    mine = torch.ones(4, 3, requires_grad=True)
    found = relate(member(pooled=True), mine, normal(1, 4, 3, dtype=torch.float32))
    (grad,) = torch.autograd.grad(found.sum(), mine)
    assert found.isfinite().all()
    assert float(grad.abs().max()) < 100.0


@token_relations
def test_a_value_depends_on_its_own_document_only(loss: Loss) -> None:
    case = make_case(loss, positions=3 * DOCUMENT)
    leaves = list(case.leaves.values())
    inside = case.knowledge.documents == 1
    grads = torch.autograd.grad(case.values()[DOCUMENT + 1], leaves, materialize_grads=True)
    assert any(grad[inside].any() for grad in grads)
    assert not any(grad[~inside].any() for grad in grads)


def test_the_distances_are_those_of_the_paper() -> None:
    mine, theirs = normal(0, 5, 3), normal(1, 5, 4)
    huber = []
    for i in range(5):
        for j in range(5):
            if i != j:
                gap = abs(_relative(mine, i, j) - _relative(theirs, i, j))
                huber.append(0.5 * gap**2 if gap <= 1 else gap - 0.5)
    found = relate(RKDDistance(pooled=True), mine, theirs)
    assert float(found.mean()) == pytest.approx(sum(huber) / len(huber))


def _relative(rows: Tensor, i: int, j: int) -> float:
    """|row i - row j| over the mean distance of all pairs."""
    pairs = [math.dist(rows[k], rows[m]) for k in range(5) for m in range(5) if k != m]
    return math.dist(rows[i], rows[j]) / (sum(pairs) / len(pairs))


def test_the_angles_are_those_of_the_paper() -> None:
    mine, theirs = normal(0, 4, 3), normal(1, 4, 5)
    huber = []
    for j in range(4):
        for i in range(4):
            for k in range(4):
                if len({i, j, k}) == 3:
                    gap = abs(_cosine(mine, i, j, k) - _cosine(theirs, i, j, k))
                    huber.append(0.5 * gap**2 if gap <= 1 else gap - 0.5)
    found = relate(RKDAngle(pooled=True), mine, theirs)
    assert float(found.mean()) == pytest.approx(sum(huber) / len(huber))


def _cosine(rows: Tensor, i: int, j: int, k: int) -> float:
    one, other = rows[i] - rows[j], rows[k] - rows[j]
    return float(one @ other / (one.norm() * other.norm()))


def test_the_gram_matrices_are_compared_as_in_the_paper() -> None:
    mine, theirs = normal(0, 5, 3), normal(1, 5, 4)
    grams = [rows @ rows.T for rows in (mine, theirs)]
    units = [gram / gram.norm(dim=1, keepdim=True) for gram in grams]
    expected = (units[0] - units[1]).square().sum() / 5**2
    found = relate(Gram(pooled=True), mine, theirs)
    assert float(found.mean()) == pytest.approx(float(expected))


def test_the_alignment_is_that_of_the_paper() -> None:
    mine, theirs = normal(0, 9, 3), normal(1, 9, 4)
    x, y = mine - mine.mean(dim=0), theirs - theirs.mean(dim=0)
    cka = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    found = relate(CKA(pooled=True), mine, theirs)
    torch.testing.assert_close(found, (1.0 - cka).expand(9))


@every_relation
def test_documents_of_any_lengths_stay_apart_and_a_window_cuts_them(
    member: type[RelationLoss],
) -> None:
    mine, theirs = normal(0, 12, 3), normal(1, 12, 4)
    documents = torch.tensor([0, 0, 0, 0, 0, 2, 3, 3, 3, 3, 3, 3])
    loss: Any = member.model_validate({"layers": {1: -1}, "window": None})
    found = relate(loss, mine, theirs, documents)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        alone = relate(loss, mine[rows], theirs[rows], documents[rows])
        torch.testing.assert_close(found[rows], alone)
    narrow = relate(loss.model_copy(update={"window": 3}), mine, theirs, documents)
    for rows in (slice(0, 3), slice(3, 5), slice(6, 9), slice(9, 12)):
        alone = relate(loss, mine[rows], theirs[rows], documents[rows])
        torch.testing.assert_close(narrow[rows], alone)


@every_relation
def test_half_precision_states_are_related_in_single_precision(member: type[RelationLoss]) -> None:
    mine, theirs = normal(0, 5, 3, dtype=torch.bfloat16), normal(1, 5, 4, dtype=torch.float32)
    found = relate(member(pooled=True), mine, theirs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, relate(member(pooled=True), mine.float(), theirs))


@every_relation
def test_a_student_learns_the_relations_of_a_wider_teacher(member: type[RelationLoss]) -> None:
    theirs = normal(1, 12, 8, dtype=torch.float32) @ normal(2, 8, 8, dtype=torch.float32)
    theirs[:, 4:] *= 0.01  # what four numbers can hold
    mine = normal(0, 12, 4, dtype=torch.float32).requires_grad_()
    optimizer = torch.optim.Adam([mine], lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        value = relate(member(pooled=True), mine, theirs).mean()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_too_small_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        RKDAngle.model_validate({"layers": {1: 1}, "window": 2})
    with pytest.raises(ConfigError, match=r"the student has 4 .* use layers: uniform"):
        RKDAngle.model_validate({"layers": "last"}).resolve(4, 2)
