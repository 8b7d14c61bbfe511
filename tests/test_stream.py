"""The order of an epoch as mathematics, and the stream that follows it."""

import numpy as np
import pytest
from cache_examples import assert_same, make_draft, make_example, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import TeacherCache, epoch_order

counts = st.integers(0, 3000)
blocks = st.integers(1, 100)
seeds = st.integers(-(2**40), 2**40)
epochs = st.integers(0, 1000)


@settings(max_examples=60, deadline=None)
@given(count=counts, block=blocks, seed=seeds, epoch=epochs)
def test_an_order_is_a_permutation_and_pure(count, block, seed, epoch):
    order = epoch_order(count, block, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, epoch_order(count, block, seed, epoch))


@settings(max_examples=30, deadline=None)
@given(count=counts, block=blocks, seed=seeds, world=st.integers(1, 9))
def test_ranks_share_an_epoch_without_overlap(count, block, seed, world):
    order = epoch_order(count, block, seed, 0)
    parts = [order[rank::world] for rank in range(world)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@settings(max_examples=30, deadline=None)
@given(block=blocks, seed=seeds, epoch=epochs)
def test_epochs_and_seeds_differ(block, seed, epoch):
    order = epoch_order(500, block, seed, epoch)
    assert (order != epoch_order(500, block, seed, epoch + 1)).any()
    assert (order != epoch_order(500, block, seed + 1, epoch)).any()


def test_a_subset_is_shuffled_like_its_places():
    rows = np.arange(1000)[::3]
    np.testing.assert_array_equal(epoch_order(rows, 8, 3, 4), rows[epoch_order(len(rows), 8, 3, 4)])


def test_the_shuffle_is_thorough():
    """Mean displacement of a full shuffle is n / 3; neighbours must not stay neighbours."""
    count = 64 * 400
    for epoch in range(3):
        order = epoch_order(count, 64, 0, epoch)
        displacement = np.abs(order - np.arange(count)).mean()
        assert abs(displacement / (count / 3) - 1) < 0.15
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01


def test_reads_stay_local():
    """Any 16 blocks' worth of the order lies in 17 or 18 runs of neighbours, ends included."""
    order = epoch_order(64 * 400, 64, 5, 2)
    for start in range(0, len(order), 64 * 16):
        window = np.sort(order[start : start + 64 * 16])
        assert (np.diff(window) > 1).sum() < 18


def test_no_two_rows_are_bound_together_for_ever():
    """Block borders move from epoch to epoch."""
    together = np.ones(1999, dtype=bool)
    for epoch in range(200):
        place = np.argsort(epoch_order(2000, 8, 1, epoch))
        together &= np.abs(np.diff(place)) < 8 * 16
    assert not together.any()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "stream"
    write_cache(path, make_draft(30))
    return TeacherCache.open(path)


def test_a_stream_gives_every_example_once_with_its_own_targets(cache):
    for epoch in range(2):
        examples = list(cache.stream(seed=3, epoch=epoch))
        assert sorted(int(e.example_id[5:]) for e in examples) == list(range(30))
        for example in examples:
            row = int(example.example_id[5:])
            assert_same(example, make_example(row, make_draft(30)))


def test_a_stream_follows_the_epochs_order(cache):
    order = epoch_order(30, 64, 3, 1)
    for rank in range(4):
        found = [e.example_id for e in cache.stream(3, 1, rank, 4)]
        assert found == [f"text-{row}" for row in order[rank::4]]


def test_a_stream_can_be_of_one_split_and_in_stored_order(cache):
    test = cache.split_indices("test")
    stored = [e.example_id for e in cache.stream(0, 0, indices=test, shuffle=False)]
    assert stored == [f"text-{row}" for row in test]
    shuffled = [e.example_id for e in cache.stream(0, 0, indices=test)]
    assert sorted(shuffled) == sorted(stored) and shuffled != stored
