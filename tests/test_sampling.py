"""Sampling by language: how much of each an epoch has, and that its order is one for all."""

import pickle
import shutil
import tracemalloc
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from cache_examples import make_draft, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline.batches import Selection, StepSampler
from pipeline.cache import RowRuns, TeacherCache, group_rows, locate
from pipeline.cache.index.groups import read_groups, write_groups
from pipeline.errors import CacheError, ConfigError
from pipeline.sampling import Deal, Sampling

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=7)
exponents = st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0])


def make_groups(counts: list[int]) -> dict[str, RowRuns]:
    """Groups l0, l1, ... whose rows follow one another."""
    starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    return {
        f"l{i}": RowRuns(np.array([start]), np.array([count]))
        for i, (start, count) in enumerate(zip(starts, counts, strict=True))
    }


def make_deal(counts: list[int], **settings: object) -> Deal:
    return Sampling.model_validate({"by": "language", **settings}).deal(make_groups(counts))


def count_draws(deal: Deal, epoch: int = 0, seed: int = 0) -> np.ndarray:
    """How often an epoch visits each row."""
    rows = sum(len(rows) for rows in deal.rows)
    return np.bincount(deal.order(seed, epoch)[:], minlength=rows)


@settings(max_examples=60, deadline=None)
@given(counts=sizes, exponent=exponents, cap=st.none() | st.integers(1, 200), data=st.data())
def test_shares_are_those_of_the_formula_to_the_row(counts, exponent, cap, data):
    weights = {f"l{i}": data.draw(st.sampled_from([0.5, 1.0, 3.0])) for i in range(len(counts))}
    deal = make_deal(counts, exponent=exponent, cap=cap, weights=weights)
    counted = np.minimum(counts, cap or max(counts))
    shares = np.array(list(weights.values())) * counted.astype(float) ** exponent
    exact = shares / shares.sum() * counted.sum()
    assert len(deal) == counted.sum()
    if (exact >= 1).all():
        assert (np.abs(deal.draws - exact) < 1 + 1e-5).all()
    assert (deal.draws >= 1).all()
    by_group = [part.sum() for part in np.split(count_draws(deal), np.cumsum(counts)[:-1])]
    np.testing.assert_array_equal(by_group, deal.draws)


@settings(max_examples=40, deadline=None)
@given(counts=sizes, repeats=st.integers(1, 4), share=st.floats(0.3, 1.0))
def test_no_row_comes_more_often_than_it_may(counts, repeats, share):
    examples = max(int(sum(counts) * repeats * share), len(counts))
    deal = make_deal(counts, exponent=0.0, max_repeats=repeats, examples=examples)
    assert (deal.draws <= np.array(counts) * repeats).all() and len(deal) == examples
    free = deal.draws[(deal.draws < np.array(counts) * repeats) & (deal.draws > 1)]
    assert len(free) == 0 or np.ptp(free) <= 1  # the others share what is left as before


@settings(max_examples=40, deadline=None)
@given(counts=sizes, examples=st.integers(7, 900), seed=st.integers(0, 99))
def test_no_row_of_a_group_is_a_second_time_ahead_of_another(counts, examples, seed):
    """Small groups are gone through several times an epoch, large ones over several epochs."""
    deal = make_deal(counts, exponent=0.3, examples=max(examples, len(counts)))
    seen = np.zeros(sum(counts), dtype=int)
    for epoch in range(4):
        seen += count_draws(deal, epoch, seed)
        for part in np.split(seen, np.cumsum(counts)[:-1]):
            assert np.ptp(part) <= 1


def test_a_group_drawn_as_often_as_it_has_rows_is_each_row_once():
    np.testing.assert_array_equal(count_draws(make_deal([5, 900, 40]), 3), 1)


@settings(max_examples=40, deadline=None)
@given(
    counts=sizes,
    size=st.integers(1, 9),
    ranks=st.integers(1, 5),
    epoch=st.integers(0, 3),
    taken=st.integers(0, 5),
)
def test_ranks_partition_one_order_and_go_on_anywhere(counts, size, ranks, epoch, taken):
    deal = make_deal(counts, exponent=0.3, examples=sum(counts) + 5)
    order = deal.order(7, epoch)[:]
    found = []
    for rank in range(ranks):
        sampler = StepSampler(deal, size, 7, rank, ranks)
        sampler.set_epoch(epoch)
        steps = [list(step) for step in sampler]
        assert [list(step) for step in list(sampler)[taken:]] == steps[taken:]
        found.append(steps)
    assert len({len(steps) for steps in found}) == 1
    for number, parts in enumerate(zip(*found, strict=True)):
        place = number * size * ranks
        step = order[place : place + sum(len(part) for part in parts)]
        for rank, part in enumerate(parts):
            assert part == step[rank::ranks].tolist()
    assert sum(len(step) for steps in found for step in steps) == len(deal)


@settings(max_examples=30, deadline=None)
@given(counts=sizes, ends=st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(1, 9)))
def test_any_part_of_an_order_is_computed_alone_and_is_pure(counts, ends):
    places = slice(min(ends[:2]), max(ends[:2]), ends[2])
    deal, again = (make_deal(counts, exponent=0.5) for _ in range(2))
    np.testing.assert_array_equal(deal.order(3, 2)[places], again.order(3, 2)[:][places])


def test_epochs_seeds_and_groups_have_orders_of_their_own():
    deal = make_deal([400, 400])
    order = deal.order(0, 0)[:]
    assert (order != deal.order(0, 1)[:]).any() and (order != deal.order(1, 0)[:]).any()
    first = make_deal([400, 400], examples=200).order(0, 0)[:]
    assert set(first[first < 400]) != set(first[first >= 400] - 400)


def test_the_same_sampled_order_on_every_machine():
    deal = make_deal([3, 3000, 10**6], exponent=0.3, examples=10**5)
    assert deal.draws.tolist() == [1841, 14622, 83537]
    order = deal.order(5, 1)
    assert order[50_000:50_006].tolist() == [128860, 1001168, 1661, 1917, 524799, 204297]


def test_neighbours_of_a_large_group_are_read_together():
    """Any buffer of an epoch lies in about an eighth as many runs of neighbours as rows."""
    order = make_deal([10**5, 10**5]).order(0, 0)[:]
    window = np.sort(order[: 8 * 256])
    assert (np.diff(window) > 1).sum() < 2 * 256 + 8


def test_a_billion_rows_are_sampled_from_little():
    groups = {
        "a": RowRuns(np.array([0]), np.array([10**9])),
        "b": RowRuns(np.array([10**9]), np.array([10**6])),
    }
    tracemalloc.start()
    sampler = StepSampler(Sampling(by="language", exponent=0.5).deal(groups), 16, 3)
    step = list(next(iter(sampler)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(sampler) == (10**9 + 10**6) // 16 and len(step) == 16 and peak < 2**26


def test_workers_are_sent_rows_and_no_order():
    deal = make_deal([700, 9])
    sampler = StepSampler(deal, 8, 0)
    sent = pickle.loads(pickle.dumps(next(iter(sampler))))
    assert sent == deal.order(0, 0)[:8].tolist() and isinstance(sent, list)
    rows = Selection(range(709))
    loader = DataLoader(rows, batch_sampler=sampler, num_workers=2, collate_fn=list)
    assert [row for step in loader for row in step] == deal.order(0, 0)[:].tolist()


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from(["ar", "he", None]), max_size=30), data=st.data())
def test_rows_are_found_by_value_in_any_part_of_a_cache(values, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    pieces = [values[a:b] for a, b in pairwise([0, *cuts, len(values)])]
    groups = group_rows(pa.array(piece, pa.large_string()) for piece in pieces)
    assert groups is not None
    assert list(groups) == sorted({str(value) for value in values})
    chosen = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=30, max_size=30)))
    chosen = chosen[chosen < len(values)]
    for name, rows in groups.items():
        expected = [row for row, value in enumerate(values) if str(value) == name]
        assert rows.tolist() == expected
        places = [place for place, row in enumerate(chosen) if row in expected]
        assert locate(rows, RowRuns.of(chosen)).tolist() == places


def test_a_cache_finds_the_rows_of_each_value_with_and_without_its_index(tmp_path: Path):
    draft = make_draft(30)
    write_cache(tmp_path, draft)
    cache = TeacherCache.open(tmp_path)
    found = [{column: cache.group(column) for column in draft.columns}]
    assert len(list((tmp_path / "index/columns").iterdir())) == len(draft.columns) > 1
    shutil.rmtree(tmp_path / "index/columns")
    found.append({column: cache.group(column) for column in draft.columns})
    for groups in found:
        for column, values in groups.items():
            assert sum(len(rows) for rows in values.values()) == 30
            for name, rows in values.items():
                told = {str(cache[int(row)].columns[column]) for row in rows.tolist()}
                assert told == {name} and rows.tolist() == found[0][column][name].tolist()
    with pytest.raises(CacheError, match="carries no column 'langage'"):
        cache.group("langage")


def test_the_index_of_a_column_tells_without_a_shard(tmp_path: Path):
    write_cache(tmp_path, make_draft(30))
    for shard in (tmp_path / "shards").iterdir():
        shutil.rmtree(shard)
    groups = TeacherCache.open(tmp_path).group("split")
    assert groups["test"].tolist() == TeacherCache.open(tmp_path).split_indices("test").tolist()


def test_a_column_of_ids_is_no_group(tmp_path: Path):
    """Such a column has no index, and one that is damaged is not believed."""
    assert group_rows([pa.array([f"id {i}" for i in range(10_001)])]) is None
    assert group_rows([pa.array([["a", "list"], ["of", "words"]])]) is None
    write_cache(tmp_path, make_draft(3))
    for file in (tmp_path / "index/columns").iterdir():
        file.write_bytes(b"ARROW1")
    with pytest.raises(CacheError, match=r"index/columns/\w+.arrow: "):
        TeacherCache.open(tmp_path).group("split")


@given(names=st.lists(st.text(max_size=4), min_size=1, max_size=12))
def test_any_text_names_a_column_and_a_value(names):
    with TemporaryDirectory() as folder:
        groups = group_rows([pa.array(names)])
        assert groups is not None
        write_groups(Path(folder), names[0], groups)
        found = read_groups(Path(folder), names[0])
        assert found is not None and list(found) == sorted(set(names))
        for name, rows in found.items():
            assert [names[row] for row in rows.tolist()] == [name] * names.count(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"l7": 2.0}}, "no language is 'l7'; choose from l0, l1"),
        ({"weights": {"l0": -1.0}}, "is -1, expected 0 or more"),
        ({"weights": {"l0": 0.0, "l1": 0.0}}, "cannot be drawn from 0 values"),
        ({"examples": 1}, "an epoch of 1 examples cannot be drawn from 2 values"),
        ({"examples": 99, "max_repeats": 2}, "one to 20 in all"),
    ],
)
def test_an_epoch_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_deal([4, 6], **settings)
    assert "\n" not in str(caught.value)


def test_a_weight_of_zero_leaves_a_language_out():
    deal = make_deal([4, 6], weights={"l0": 0.0})
    assert deal.names == ("l1",) and count_draws(deal)[:4].sum() == 0 and len(deal) == 6
