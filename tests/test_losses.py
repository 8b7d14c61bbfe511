"""What every loss promises. A new member of LOSSES is picked up by itself."""

from pathlib import Path
from typing import Annotated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PADDED, V, all_losses, describe, make_case, normal, relates_rows

from pipeline.config import StrictModel, dump_config, load_config, member_of, parse_config
from pipeline.errors import ConfigError
from pipeline.losses import LOSSES, Loss, Schedule
from pipeline.targets import UNLABELLED

every_loss = pytest.mark.parametrize("loss", all_losses(), ids=describe)
label_losses = pytest.mark.parametrize(
    "loss", [loss for loss in all_losses() if loss.unit == "labels"], ids=describe
)
independent_losses = pytest.mark.parametrize(
    "loss", [loss for loss in all_losses() if not relates_rows(loss)], ids=describe
)
divisible_losses = pytest.mark.parametrize(
    "loss",
    [loss for loss in all_losses() if not relates_rows(loss) or loss.unit != "examples"],
    ids=describe,
)
# Whoever compares sorted probabilities takes every row of the head, until the classes are counted.
aware_losses = pytest.mark.parametrize(
    "loss", [loss for loss in all_losses() if loss != LOSSES["uld"]()], ids=describe
)
splits = st.lists(st.integers(0, 3), min_size=6, max_size=6)


class Recipe(StrictModel):
    """A config that holds losses, as a student's does."""

    losses: list[Annotated[Loss, *member_of(LOSSES, "loss")]]


@every_loss
def test_there_is_one_value_per_position_and_no_reduction(loss: Loss) -> None:
    values = make_case(loss, positions=6).values()
    assert values.shape == (6,)
    assert values.dtype == torch.float64
    assert len(set(values.tolist())) > 1


@every_loss
def test_single_precision_gives_single_precision(loss: Loss) -> None:
    case = make_case(loss, dtype=torch.float32)
    assert case.values().dtype == torch.float32
    torch.testing.assert_close(
        case.values().double(), make_case(loss).values(), rtol=1e-4, atol=1e-4
    )


@independent_losses
def test_a_value_depends_on_its_own_position_only(loss: Loss) -> None:
    case = make_case(loss)
    leaves = list(case.leaves.values())
    grads = torch.autograd.grad(case.values()[2], leaves, materialize_grads=True)
    for grad in grads:
        grad[2] = 0.0
        assert torch.count_nonzero(grad) == 0


@every_loss
def test_positions_that_were_not_picked_have_gradient_zero(loss: Loss) -> None:
    case = make_case(loss, positions=8)
    part = case.select(torch.tensor([0, 1, 2, 5]))
    grads = torch.autograd.grad(
        part.values().sum(), list(case.leaves.values()), materialize_grads=True
    )
    assert any(torch.count_nonzero(grad) for grad in grads)
    for grad in grads:
        assert torch.count_nonzero(grad[[3, 4, 6, 7]]) == 0


@every_loss
def test_positions_without_a_label_count_only_where_labels_do_not(loss: Loss) -> None:
    case = make_case(loss)
    values, grad = case.values(), case.gradients()["logits"]
    unlabelled = case.knowledge.label_ids == UNLABELLED
    if loss.unit == "labels":
        assert values[unlabelled].tolist() == [0.0] * int(unlabelled.sum())
        assert torch.count_nonzero(grad[unlabelled]) == 0
    else:
        assert torch.count_nonzero(values[unlabelled]) == int(unlabelled.sum())


@divisible_losses
@given(split=splits)
@settings(max_examples=15)
def test_value_and_gradient_are_the_same_for_any_split_into_micro_batches(
    loss: Loss, split: list[int]
) -> None:
    whole = make_case(loss, positions=6)
    leaves = list(whole.leaves.values())
    batches = torch.tensor(split)
    if relates_rows(loss):
        batches = batches[whole.knowledge.documents]  # a document is never divided
    parts = [whole.select(batches == batch) for batch in range(4)]
    assert sum(part.counted() for part in parts) == pytest.approx(whole.counted())
    mean = sum(part.values().sum() for part in parts) / whole.counted()
    expected = whole.values().sum() / whole.counted()
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(mean, leaves, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@every_loss
def test_a_batch_without_positions_contributes_nothing(loss: Loss) -> None:
    case = make_case(loss, positions=0)
    assert case.values().shape == (0,)
    assert case.values().sum().item() == 0.0
    for leaf, grad in zip(case.leaves.values(), case.gradients().values(), strict=True):
        assert grad.shape == leaf.shape


@label_losses
def test_a_batch_without_labels_contributes_nothing(loss: Loss) -> None:
    case = make_case(loss)
    case.knowledge.label_ids.fill_(UNLABELLED)
    assert case.values().tolist() == [0.0] * 6
    assert case.gradients()["logits"].tolist() == [[0.0] * PADDED] * 6


@every_loss
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_extreme_outputs_give_finite_values_and_gradients(loss: Loss, seed: int) -> None:
    case = make_case(loss, seed=seed, dtype=torch.float32)
    for name, leaf in case.leaves.items():
        case = case.with_leaf(name, 1e4 * normal(seed, *leaf.shape, dtype=torch.float32).sign())
    assert case.values().isfinite().all()
    assert all(grad.isfinite().all() for grad in case.gradients().values())


@every_loss
@given(st.integers(0, 10_000), st.lists(st.integers(0, PADDED - 1), max_size=V - 1))
@settings(max_examples=15)
def test_classes_that_a_student_rules_out_give_no_nan(
    loss: Loss, seed: int, ruled_out: list[int]
) -> None:
    case = make_case(loss, seed=seed)
    logits = case.leaves["logits"].detach().clone()
    logits[:, ruled_out] = -torch.inf
    case = case.with_leaf("logits", logits)
    assert not case.values().isnan().any()
    assert not any(grad.isnan().any() for grad in case.gradients().values())


@aware_losses
def test_the_padding_of_the_head_is_no_class(loss: Loss) -> None:
    case = make_case(loss)
    logits = case.leaves["logits"].detach().clone()
    logits[:, V:] = 50.0
    padded = case.with_leaf("logits", logits)
    assert torch.equal(padded.values(), case.values())
    assert torch.count_nonzero(padded.gradients()["logits"][:, V:]) == 0


@every_loss
def test_gradients_equal_finite_differences(loss: Loss) -> None:
    case = make_case(loss, positions=3)
    leaves = list(case.leaves.values())
    parameters = list(case.projections.parameters())

    def values(*_: torch.Tensor) -> torch.Tensor:
        return case.values()

    assert torch.autograd.gradcheck(values, (*leaves, *parameters))


def test_a_member_is_found_by_its_name_and_keeps_its_settings() -> None:
    raw = {"losses": [{"name": "forward_kl", "temperature": 2}, "cross_entropy"]}
    recipe = parse_config(Recipe, raw, "student.yaml")
    assert [list(loss.temperatures_needed) for loss in recipe.losses] == [[2.0], []]
    assert recipe.model_dump()["losses"][0]["temperature"] == 2.0
    assert set(LOSSES) == {member.model_fields["name"].default for member in LOSSES.values()}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "foward_kl"}, "'foward_kl' is not known; did you mean 'forward_kl'"),
        ({"name": "forward_kl", "temprature": 2}, "did you mean 'temperature'"),
        ({"name": "forward_kl", "temperature": 0}, "greater than 0"),
        ({"name": "forward_kl", "tail": "buckets"}, "bucket"),
        ({"name": "cross_entropy", "label_smoothing": 1.5}, "less than 1"),
        ({"name": "hidden_mse", "layers": "unifrom"}, "expected uniform, last, or {student layer"),
        ({"name": "forward_kl", "temperature": {0.5: 2.0}}, "the temperature at the start"),
        ({"name": "forward_kl", "temperature": {0: 2, 1.5: 1}}, "less than 1"),
        ({"name": "forward_kl", "temperature": "hot"}, r"temperature.number: .* valid number"),
        ({"name": "forward_kl", "weight": {"peak": 1, "dcay": 0.6}}, "did you mean 'decay'"),
        ({"name": "forward_kl", "weight": {"start": 1}}, "Schedule.end is missing"),
        ({"name": "cross_entropy", "weight": {"peak": 1, "warmup": 0.7, "decay": 0.6}}, "shorter"),
        ({"name": "hidden_mse"}, "either layers: .* or pooled: true"),
        ({"name": "hidden_cosine", "pooled": True, "layers": {1: 2}}, "either layers"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_with_advice(
    loss: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(Recipe, {"losses": [loss]}, "student.yaml")


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0.5, 1))
def test_a_scheduled_weight_stays_between_its_ends_and_reaches_them(
    progress: float, begin: float, until: float
) -> None:
    schedule = Schedule(start=0.9, end=0.1, begin=begin, until=until)
    loss = LOSSES["cross_entropy"](weight=schedule)
    assert 0.1 - 1e-12 <= loss.weight_at(progress) <= 0.9
    assert loss.weight_at(0.0) == 0.9
    assert loss.weight_at(1.0) == pytest.approx(0.1)


@given(st.floats(0, 1))
def test_warmup_stable_decay_is_at_its_peak_between_its_ends(progress: float) -> None:
    schedule = {"peak": 0.9, "start": 0.1, "end": 0.3, "warmup": 0.2, "decay": 0.4}
    loss = LOSSES["cross_entropy"].model_validate({"weight": schedule})
    found = loss.weight_at(progress)
    assert 0.1 <= found <= 0.9
    if 0.2 <= progress <= 0.6:
        assert found == 0.9
    assert [loss.weight_at(end) for end in (0.0, 0.1, 0.8, 1.0)] == pytest.approx(
        [0.1, 0.5, 0.6, 0.3]
    )


@given(st.floats(0, 1))
def test_a_temperature_holds_from_its_share_of_the_steps_on(progress: float) -> None:
    steps = {0.0: 4.0, 0.5: 2.0, 0.8: 1.0}
    loss = LOSSES["forward_kl"].model_validate({"temperature": steps, "tail": "bucket"})
    assert list(loss.temperatures_needed) == [1.0, 2.0, 4.0]
    now = 4.0 if progress < 0.5 else 2.0 if progress < 0.8 else 1.0
    plain = LOSSES["forward_kl"].model_validate({"temperature": now, "tail": "bucket"})
    assert loss.at(progress) == plain
    assert loss.at(progress).gradient_scale == now**2
    assert torch.equal(make_case(loss.at(progress)).values(), make_case(plain).values())


def test_schedules_survive_the_file_that_they_are_written_to(tmp_path: Path) -> None:
    raw = {"name": "skew_kl", "temperature": {0: 2, 0.5: 1}, "weight": {"peak": 1, "decay": 0.3}}
    recipe = parse_config(Recipe, {"losses": [raw]}, "student.yaml")
    file = tmp_path / "student.yaml"
    file.write_text(dump_config(recipe), encoding="utf-8")
    assert load_config(Recipe, file) == recipe
