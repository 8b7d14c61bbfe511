"""Hidden states: widths matched by a learned map, pairs averaged, or pooled vectors instead."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import normal
from torch import nn

from pipeline.errors import ConfigError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.hidden import HiddenCosine, HiddenLoss, HiddenMSE

both = pytest.mark.parametrize("member", [HiddenMSE, HiddenCosine])
NO_LABELS = torch.empty(0, dtype=torch.int64)


def compare(
    loss: HiddenLoss,
    student: dict[str, torch.Tensor],
    teacher: dict[str, torch.Tensor],
    projections: nn.ModuleDict | None = None,
) -> torch.Tensor:
    outputs = StudentOutputs(torch.empty(0, 1), student)
    knowledge = Knowledge(None, NO_LABELS, teacher)
    return loss.per_position(outputs, knowledge, projections or nn.ModuleDict())


def test_mse_is_the_mean_over_the_width_of_one_position() -> None:
    loss = HiddenMSE(layers={1: -1}, projection="none")
    mine = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    theirs = torch.tensor([[1.0, 5.0], [1.0, -1.0]])
    assert compare(loss, {"layer.1": mine}, {"layer.-1": theirs}).tolist() == [4.5, 1.0]


def test_cosine_sees_the_direction_only() -> None:
    loss = HiddenCosine(layers={1: -1}, projection="none")
    mine = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    theirs = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 4.0]])
    found = compare(loss, {"layer.1": mine}, {"layer.-1": theirs})
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 1.0]))


@both
@given(seed=st.integers(0, 1000))
def test_equal_states_cost_nothing_and_pull_nowhere(member: type[HiddenLoss], seed: int) -> None:
    mine = normal(seed, 4, 5).requires_grad_()
    loss = member(layers={-1: -1}, projection="none")
    found = compare(loss, {"layer.-1": mine}, {"layer.-1": mine.detach().clone()})
    (grad,) = torch.autograd.grad(found.sum(), mine)
    torch.testing.assert_close(found, torch.zeros_like(found))
    torch.testing.assert_close(grad, torch.zeros_like(grad))


@both
def test_several_layers_count_as_their_mean(member: type[HiddenLoss]) -> None:
    student = {"layer.0": normal(0, 3, 4), "layer.-1": normal(1, 3, 4)}
    teacher = {"layer.2": normal(2, 3, 4), "layer.-1": normal(3, 3, 4)}
    pairs = [
        compare(member(layers={mine: theirs}, projection="none"), student, teacher)
        for mine, theirs in ((0, 2), (-1, -1))
    ]
    together = compare(member(layers={0: 2, -1: -1}, projection="none"), student, teacher)
    torch.testing.assert_close(together, (pairs[0] + pairs[1]) / 2)


@both
def test_pooled_vectors_are_counted_by_example(member: type[HiddenLoss]) -> None:
    loss = member(pooled=True)
    torch.manual_seed(0)
    projections = loss.projections(3, 5)
    found = compare(
        loss, {"pooled": normal(0, 2, 3)}, {"pooled": normal(1, 2, 5)}, projections.double()
    )
    assert (loss.unit, dict(loss.compares)) == ("examples", {"pooled": "pooled"})
    assert found.shape == (2,)


def test_layers_are_asked_for_as_the_config_wrote_them() -> None:
    loss = HiddenMSE.model_validate({"layers": {"-1": -2, 0: 0}})
    assert loss.unit == "features"
    assert dict(loss.compares) == {"layer.-1": "layer.-2", "layer.0": "layer.0"}


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, {1: 3, 2: 6, 3: 9, 4: 12}),
        ("uniform", 2, 5, {1: 3, 2: 5}),
        ("uniform", 3, 2, {1: 1, 2: 2, 3: 2}),
        ("last", 3, 12, {1: 10, 2: 11, 3: 12}),
        ("last", 2, 2, {1: 1, 2: 2}),
    ],
)
def test_a_rule_pairs_every_layer_of_the_student_once_both_depths_are_known(
    rule: str, student: int, teacher: int, expected: dict[int, int]
) -> None:
    loss = HiddenMSE.model_validate({"layers": rule, "weight": 0.5}).resolve(student, teacher)
    assert loss.layers == expected
    assert loss.weight == 0.5


def test_chosen_layers_stay_as_they_were_chosen() -> None:
    loss = HiddenCosine(layers={-1: 3})
    assert loss.resolve(2, 12) == loss


def test_a_rule_that_does_not_fit_the_depths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers: last, but the student has 5 .* use .* uniform"):
        HiddenMSE(layers="last").resolve(5, 3)
    with pytest.raises(ConfigError, match="no layers that can be counted; name them"):
        HiddenMSE(layers="uniform").resolve(0, 3)


def test_the_normalised_mse_is_the_squared_distance_of_unit_vectors() -> None:
    loss = HiddenMSE(layers={1: -1}, normalise=True, projection="none")
    mine, theirs = normal(0, 6, 4), normal(1, 6, 4)
    units = [vectors / vectors.norm(dim=1, keepdim=True) for vectors in (mine, theirs)]
    found = compare(loss, {"layer.1": mine}, {"layer.-1": theirs})
    torch.testing.assert_close(found, (units[0] - units[1]).square().sum(dim=1))
    torch.testing.assert_close(
        compare(loss, {"layer.1": 7 * mine}, {"layer.-1": 0.1 * theirs}), found
    )


def test_projections_are_the_same_for_the_same_seed() -> None:
    loss = HiddenMSE(layers={1: 2, -1: -1})
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(loss.projections(3, 5).state_dict())
    assert len(states[0]) == 4
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


def test_no_projection_demands_equal_widths() -> None:
    loss = HiddenMSE(layers={1: 2}, projection="none")
    assert len(loss.projections(4, 4)) == 0
    with pytest.raises(ConfigError, match=r"hidden_mse: projection: none, but .* 3 wide .* 4; use"):
        loss.projections(3, 4)


@both
def test_a_projection_learns_a_linear_map_between_the_widths(member: type[HiddenLoss]) -> None:
    loss = member(layers={1: -1})
    mine = normal(0, 64, 3, dtype=torch.float32)
    theirs = mine @ normal(1, 3, 5, dtype=torch.float32) + 0.5
    torch.manual_seed(0)
    projections = loss.projections(3, 5)
    optimizer = torch.optim.Adam(projections.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        found = compare(loss, {"layer.1": mine}, {"layer.-1": theirs}, projections).mean()
        found.backward()
        optimizer.step()
    assert found.item() < 1e-3


@both
def test_half_precision_states_are_compared_in_single_precision(member: type[HiddenLoss]) -> None:
    mine, theirs = normal(0, 4, 5, dtype=torch.bfloat16), normal(1, 4, 5, dtype=torch.float32)
    loss = member(layers={1: -1}, projection="none")
    found = compare(loss, {"layer.1": mine}, {"layer.-1": theirs})
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, compare(loss, {"layer.1": mine.float()}, {"layer.-1": theirs})
    )
    torch.manual_seed(0)
    loss = member(layers={1: -1})
    projected = compare(loss, {"layer.1": mine}, {"layer.-1": theirs}, loss.projections(5, 5))
    assert projected.dtype == torch.float32


def test_a_state_of_zeros_has_a_finite_gradient() -> None:
    mine = torch.zeros(2, 3, requires_grad=True)
    loss = HiddenCosine(layers={1: -1}, projection="none")
    found = compare(loss, {"layer.1": mine}, {"layer.-1": torch.eye(2, 3)})
    (grad,) = torch.autograd.grad(found.sum(), mine)
    assert found.tolist() == [1.0, 1.0]
    assert grad.isfinite().all()
