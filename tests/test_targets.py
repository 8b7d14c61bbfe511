"""Targets: exact at every cached temperature, refused at any other."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.targets import UNLABELLED, Targets
from pipeline.teacher.sparse import sparse_targets

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
NUM_CLASSES = 12


def keep_largest(logits: torch.Tensor, kept: int, draws: int = 0) -> Targets:
    """Targets in float64 straight from the definition; draws walk through the tail in turn."""
    order = logits.argsort(dim=1, descending=True)
    ids, tail = order[:, :kept], order[:, kept:]
    draw_ids = tail[:, torch.arange(draws) % max(tail.shape[1], 1)]
    labels = torch.arange(len(logits)) % logits.shape[1]
    labels[::3] = UNLABELLED
    label_log_probs = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return Targets(
        ids=ids,
        logits=logits.gather(1, ids),
        draw_ids=draw_ids,
        draw_logits=logits.gather(1, draw_ids),
        logsumexp=torch.stack([(logits / t).logsumexp(1) for t in TEMPERATURES], dim=1),
        label_ids=labels,
        label_log_probs=label_log_probs.masked_fill(labels == UNLABELLED, 0.0),
        temperatures=TEMPERATURES,
        num_classes=logits.shape[1],
    )


def random_logits(seed: int, rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, NUM_CLASSES, generator=generator, dtype=torch.float64)


def tensors_of(targets: Targets) -> dict[str, torch.Tensor]:
    return {k: v for k, v in vars(targets).items() if isinstance(v, torch.Tensor)}


@given(st.integers(0, 10_000), st.integers(0, NUM_CLASSES), st.sampled_from(TEMPERATURES))
def test_kept_probabilities_and_tail_mass_are_exact_at_every_cached_temperature(
    seed: int, kept: int, temperature: float
) -> None:
    logits = random_logits(seed)
    dense = (logits / temperature).softmax(dim=1)
    seen = keep_largest(logits, kept).at(temperature)
    torch.testing.assert_close(seen.log_probs.exp(), dense.gather(1, seen.ids))
    cut_off = dense.scatter(1, seen.ids, 0.0).sum(dim=1)
    torch.testing.assert_close(seen.tail_mass, cut_off, rtol=1e-9, atol=1e-12)
    assert seen.num_classes == NUM_CLASSES


@given(st.integers(0, 10_000), st.sampled_from(TEMPERATURES))
def test_nothing_is_cut_off_where_every_class_is_kept(seed: int, temperature: float) -> None:
    targets = keep_largest(random_logits(seed), NUM_CLASSES)
    seen = targets.at(temperature)
    assert seen.tail_mass.tolist() == [0.0] * len(targets)
    torch.testing.assert_close(seen.log_probs.exp().sum(1), torch.ones(6, dtype=torch.float64))


@given(st.integers(0, 10_000), st.integers(0, NUM_CLASSES - 1), st.sampled_from(TEMPERATURES))
def test_draw_weights_average_to_the_tail_probabilities(
    seed: int, kept: int, temperature: float
) -> None:
    logits = random_logits(seed)
    tail_size = NUM_CLASSES - kept
    seen = keep_largest(logits, kept, draws=tail_size).at(temperature)
    dense = (logits / temperature).softmax(dim=1).gather(1, seen.draw_ids)
    proposal = logits.softmax(dim=1).gather(1, seen.draw_ids)
    proposal = proposal / proposal.sum(dim=1, keepdim=True)
    torch.testing.assert_close(seen.draw_log_probs.exp(), dense)
    torch.testing.assert_close(tail_size * proposal * seen.draw_weights, dense)


def test_a_temperature_that_was_not_cached_is_refused_with_those_that_were() -> None:
    with pytest.raises(ConfigError, match=r"temperature 3: .* at 0\.5, 1, 2, 4 only; use one of"):
        keep_largest(random_logits(0), 3).at(3.0)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 6), max_size=3))
def test_any_cut_into_parts_joins_to_the_whole(seed: int, cuts: list[int]) -> None:
    targets = keep_largest(random_logits(seed), kept=4, draws=2)
    edges = [0, *sorted(cuts), 6]
    parts = [targets.select(slice(a, b)) for a, b in pairwise(edges)]
    joined = Targets.cat(parts)
    assert len(joined) == 6
    for name, tensor in tensors_of(targets).items():
        assert torch.equal(getattr(joined, name), tensor), name


@pytest.mark.parametrize(
    "index", [torch.tensor([4, 0, 4]), torch.tensor([False, True, False, False, True, True])]
)
def test_selected_positions_keep_all_that_belongs_to_them(index: torch.Tensor) -> None:
    targets = keep_largest(random_logits(1), kept=4, draws=2)
    selected = targets.select(index)
    assert len(selected) == 3
    for name, tensor in tensors_of(targets).items():
        assert torch.equal(getattr(selected, name), tensor[index]), name
    assert (selected.temperatures, selected.num_classes) == (TEMPERATURES, NUM_CLASSES)


def test_moving_to_a_device_moves_every_tensor() -> None:
    moved = keep_largest(random_logits(1), kept=4, draws=2).to("meta")
    assert {tensor.device.type for tensor in tensors_of(moved).values()} == {"meta"}


def test_classes_that_fall_together_add_up_at_every_temperature() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    labels = torch.full((3,), UNLABELLED)
    targets = sparse_targets(logits, "all", 0, (0.5, 1.0, 4.0), labels)
    groups = torch.tensor([[2, 2, 0, 4, 2], [0, 1, 2, 3, 4], [1, 1, 1, 1, -1]])
    moved = targets.regroup(groups)
    for temperature in (0.5, 1.0, 4.0):
        probs = (logits / temperature).softmax(1)
        expected = torch.zeros(3, 6).scatter_add(1, groups % 6, probs)[:, :5]
        expected = expected / expected.sum(dim=1, keepdim=True)
        found = moved.at(temperature)
        dense = torch.zeros(3, 5).scatter(1, found.ids, found.log_probs.exp())
        torch.testing.assert_close(dense, expected, rtol=0.0, atol=1e-6)
        assert not found.tail_mass.any()
    joined = Targets.cat([targets, moved]).select(slice(2, 4))
    for name in ("ids", "log_probs"):
        found = getattr(joined.at(4.0), name)
        assert torch.equal(found[0], getattr(targets.at(4.0), name)[2])
        assert torch.equal(found[1], getattr(moved.at(4.0), name)[0])


def test_of_a_truncated_record_what_was_kept_is_moved() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    targets = sparse_targets(logits, 3, 0, (1.0,), torch.tensor([UNLABELLED]))
    said = targets.at(1.0)
    moved = targets.regroup(torch.tensor([[4, 4, -1, 0, 0]])).at(1.0)
    probs = logits.softmax(1)[0]
    assert moved.ids[0, 0] == 4 and moved.log_probs[0, 0].exp() == pytest.approx(
        float(probs[:2].sum())
    )
    assert moved.log_probs[0, 1:].tolist() == [-torch.inf] * 2
    assert moved.tail_mass[0] == pytest.approx(float(said.tail_mass[0] + probs[2]), abs=1e-6)


def test_draws_cannot_be_added_up() -> None:
    logits = torch.zeros(1, 5)
    targets = sparse_targets(logits, 2, 1, (1.0,), torch.tensor([UNLABELLED]))
    with pytest.raises(ConfigError, match="draws stand for single classes"):
        targets.regroup(torch.arange(5)[None])
