"""Sparse targets against the dense softmax they are taken from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.targets import UNLABELLED
from pipeline.teacher.sparse import sparse_targets

TEMPERATURES = (0.5, 1.0, 2.0)


def make_logits(rows: int, classes: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator) * spread


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def no_labels(rows: int) -> torch.Tensor:
    return torch.full((rows,), UNLABELLED)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 700),
    rows=st.integers(1, 5),
    share=st.floats(0, 1),
    offset=st.sampled_from([0.0, 80.0, -1000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    drawn=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_kept_entries_normalisers_and_labels_equal_the_dense_softmax(
    classes: int, rows: int, share: float, offset: float, dtype: torch.dtype, drawn: bool, seed: int
) -> None:
    kept = round(share * classes)
    logits = (make_logits(rows, classes, seed) + offset).to(dtype)
    dense = logits.double()
    labels = torch.randint(0, classes, (rows,), generator=make_generator(seed))
    draws = 2 if drawn and kept < classes else 0
    targets = sparse_targets(logits, kept, draws, TEMPERATURES, labels, make_generator(seed))
    assert targets.ids.shape == (rows, kept)
    assert all(len(set(row)) == kept for row in targets.ids.tolist())
    torch.testing.assert_close(targets.logits.double(), dense.topk(kept).values, rtol=0, atol=0)
    torch.testing.assert_close(targets.logits.double(), dense.gather(1, targets.ids))
    for temperature in TEMPERATURES:
        expected = torch.log_softmax(dense / temperature, dim=1).gather(1, targets.ids)
        found = targets.at(temperature).log_probs.double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=4e-4)
    expected = torch.log_softmax(dense, dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(targets.label_log_probs.double(), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("draws", [0, 2])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0, 4.0), (0.5, 1.0, 3.0, 6.0), (0.7, 1.0, 1.4)])
def test_normalisers_are_those_of_float64_however_the_temperatures_are_spaced(
    temperatures: tuple[float, ...], draws: int
) -> None:
    logits = make_logits(4, 1000, spread=12.0)
    found = sparse_targets(logits, 64, draws, temperatures, no_labels(4), make_generator())
    for column, temperature in enumerate(temperatures):
        expected = (logits.double() / temperature).logsumexp(dim=1)
        torch.testing.assert_close(found.logsumexp[:, column].double(), expected, rtol=0, atol=2e-5)


def test_entries_that_tie_are_kept_once_each_and_the_rest_is_drawn() -> None:
    logits = torch.zeros(2, 300)
    targets = sparse_targets(logits, 64, 200, (1.0,), no_labels(2), make_generator())
    for kept, drawn in zip(targets.ids.tolist(), targets.draw_ids.tolist(), strict=True):
        assert len(set(kept)) == 64
        assert not set(kept) & set(drawn)
    assert bool((targets.logits == 0.0).all())


def test_all_keeps_every_class_and_leaves_no_tail() -> None:
    targets = sparse_targets(make_logits(3, 7), "all", 0, (1.0,), no_labels(3))
    assert targets.ids.sort(dim=1).values.tolist() == [list(range(7))] * 3
    assert targets.at(1.0).tail_mass.tolist() == [0.0] * 3
    assert targets.label_log_probs.tolist() == [0.0] * 3


def test_the_logits_of_the_model_are_not_changed() -> None:
    logits = make_logits(4, 50)
    before = logits.clone()
    sparse_targets(logits, 5, 3, TEMPERATURES, no_labels(4), make_generator())
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 400),
    share=st.floats(0, 0.999),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_a_draw_is_never_a_kept_class(classes: int, share: float, spread: float, seed: int) -> None:
    kept = min(int(share * classes), classes - 1)
    logits = make_logits(4, classes, seed, spread)
    targets = sparse_targets(logits, kept, 16, (1.0,), no_labels(4), make_generator(seed))
    assert targets.draw_ids.shape == (4, 16)
    assert int(targets.draw_ids.min()) >= 0
    assert int(targets.draw_ids.max()) < classes
    assert not (targets.draw_ids[:, :, None] == targets.ids[:, None, :]).any()
    assert torch.equal(targets.draw_logits, logits.gather(1, targets.draw_ids))


@pytest.mark.parametrize("kept", [0, 3])
def test_draws_follow_the_softmax_of_the_tail(kept: int) -> None:
    draws = 200_000
    logits = make_logits(1, 40, seed=1, spread=1.0)
    targets = sparse_targets(logits, kept, draws, (1.0,), no_labels(1), make_generator())
    expected = torch.softmax(logits[0].double(), dim=0)
    expected[targets.ids[0]] = 0.0
    expected /= expected.sum()
    found = torch.bincount(targets.draw_ids[0], minlength=40).double() / draws
    deviations = (found - expected) / (expected * (1 - expected) / draws).sqrt().clamp(min=1e-12)
    assert float(deviations[expected > 0].abs().max()) < 4.5
    assert float(found[expected == 0].sum()) == 0.0


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kept", [0, 4])
def test_head_and_weighted_draws_are_unbiased_at_every_temperature(
    kept: int, temperature: float
) -> None:
    classes, draws = 60, 400_000
    logits = make_logits(1, classes, seed=2, spread=1.0)
    targets = sparse_targets(logits, kept, draws, TEMPERATURES, no_labels(1), make_generator())
    sparse = targets.at(temperature)
    estimate = torch.zeros(classes, dtype=torch.float64)
    estimate.index_add_(0, sparse.draw_ids[0], sparse.draw_weights[0].double())
    estimate.index_add_(0, sparse.ids[0], sparse.log_probs[0].exp().double())
    expected = torch.softmax(logits[0].double() / temperature, dim=0)
    torch.testing.assert_close(estimate, expected, rtol=0.06, atol=2e-4)
    assert float(estimate.sum()) == pytest.approx(1.0, abs=5e-3)


def test_fifty_draws_name_as_many_distinct_classes_as_fifty_draws_should() -> None:
    logits = -torch.arange(1, 20_001).float().log()[None]  # Zipf
    rows = logits.expand(400, -1)
    targets = sparse_targets(rows, 0, 50, (1.0,), no_labels(400), make_generator())
    distinct = [len(set(row)) for row in targets.draw_ids.tolist()]
    expected = 1 - (1 - torch.softmax(logits[0].double(), 0)) ** 50
    assert sum(distinct) / 400 == pytest.approx(float(expected.sum()), abs=0.4)
    assert max(distinct) < 50


def test_classes_beyond_2_to_the_18_are_found_and_drawn() -> None:
    classes = 2**18 + 77
    logits = torch.full((2, classes), -20.0)
    logits[0, classes - 1], logits[0, 5] = 9.0, 8.0
    logits[1, classes - 2], logits[1, classes - 1] = 9.0, 8.0
    targets = sparse_targets(logits, 1, 8, (1.0,), no_labels(2), make_generator())
    assert targets.ids.tolist() == [[classes - 1], [classes - 2]]
    assert targets.draw_ids.tolist() == [[5] * 8, [classes - 1] * 8]


def test_a_tail_far_below_the_head_is_still_drawn_from_its_own_softmax() -> None:
    logits = torch.tensor([[900.0, 1.0, 0.0, 0.0]])
    targets = sparse_targets(logits, 1, 40_000, (1.0,), no_labels(1), make_generator())
    share = (targets.draw_ids[0] == 1).double().mean()
    assert float(share) == pytest.approx(float(torch.softmax(logits[0, 1:], 0)[0]), abs=0.01)
    assert float(targets.at(1.0).draw_weights.sum()) == pytest.approx(0.0, abs=1e-6)


def test_the_same_generator_gives_the_same_draws_and_another_gives_others() -> None:
    logits = make_logits(8, 300)
    first, again, other = (
        sparse_targets(logits, 4, 6, (1.0,), no_labels(8), make_generator(seed)).draw_ids
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 99, 299])
def test_a_row_with_a_number_that_is_not_finite_has_a_nan_normaliser(
    bad: float, column: int
) -> None:
    logits = make_logits(
        3, 300
    )  # in draws, 300 classes are groups of 17, with 6 columns of padding
    logits[1, column] = bad
    targets = sparse_targets(logits, 4, 2, TEMPERATURES, no_labels(3), make_generator())
    assert targets.logsumexp.isfinite().all(dim=1).tolist() == [True, False, True]
    everything = sparse_targets(logits * bad, 4, 2, (1.0,), no_labels(3), make_generator())
    assert not everything.logsumexp.isfinite().any()


def test_no_positions_give_no_targets() -> None:
    targets = sparse_targets(make_logits(0, 100), 4, 2, (1.0,), no_labels(0), make_generator())
    assert targets.ids.shape == (0, 4)
    assert targets.draw_ids.shape == (0, 2)


def test_more_kept_classes_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 is above the class count, 7"):
        sparse_targets(make_logits(1, 7), 8, 0, (1.0,), no_labels(1))


def test_draws_without_a_tail_are_refused() -> None:
    with pytest.raises(ConfigError, match="no tail to come from"):
        sparse_targets(make_logits(1, 7), "all", 2, (1.0,), no_labels(1))
