"""A cache of 100,000 shards and 10^9 rows opens like a small one: only what grows is made up."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cache_examples import assert_same, make_draft, make_example, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches import Selection
from pipeline.cache import TargetsSpec, TeacherCache
from pipeline.cache.documents import write_sealed
from pipeline.cache.index.ids import write_ids
from pipeline.cache.index.splits import RowRuns, find_split, write_shards, write_split
from pipeline.cache.manifest import Manifest, Totals
from pipeline.errors import CacheError
from pipeline.runs import write_json

SHARDS = 100_000
ROWS = 10**9


def make_up(path: Path, shards: int, rows: int) -> None:
    """What opening reads of a cache, without its shards."""
    draft = make_draft(rows, shard_examples=-(-rows // shards))
    digests = (hashlib.sha256(b"%d" % shard).hexdigest() for shard in range(shards))
    manifest = Manifest(
        **draft.model_dump(mode="json"),
        shards=write_shards(path, digests),
        totals=Totals(examples=rows, targets=rows, features=0, tokens=rows, bytes=rows),
    )
    write_json(path / "manifest.json", manifest.model_dump(mode="json"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "large"
    make_up(path, SHARDS, ROWS)
    return path


def test_a_large_cache_opens_from_a_small_manifest(large, tmp_path):
    make_up(tmp_path, 1, 10)
    sizes = [(path / "manifest.json").stat().st_size for path in (large, tmp_path)]
    assert abs(sizes[0] - sizes[1]) < 100 and max(sizes) < 4096
    assert not (large / "shards").exists()
    tracemalloc.start()
    streams = [TeacherCache.open(large).stream(0, epoch, rank=epoch) for epoch in range(10)]
    for stream in streams:
        with pytest.raises(CacheError, match=r"shards/\d+/shard.json: cannot be read"):
            next(stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20  # 10^5 digests alone would be 12 MB as text, 10^9 rows 8 GB


def test_ten_streams_of_a_cache_share_its_pages(tmp_path):
    """Ten readers hold the codes of what they read where the file is mapped, and no copy of it."""
    spec = TargetsSpec(top_k=1_000, codec="lossless", compression="none")
    write_cache(tmp_path, make_draft(40, targets=spec, num_classes=5_000, shard_examples=40))
    size = (tmp_path / "shards/00000/rows.arrow").stat().st_size
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    streams = [TeacherCache.open(tmp_path).stream(0, epoch) for epoch in range(10)]
    examples = [next(stream) for stream in streams]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 10**6 and len(examples) == 10
    assert pa.total_allocated_bytes() - before < size / 10 and peak < size


def test_only_the_shard_of_a_row_is_looked_for(large):
    cache = TeacherCache.open(large)
    assert len(cache) == ROWS
    for row, folder in ((0, "shards/00000"), (-1, "shards/99999"), (123_456_789, "shards/12345")):
        with pytest.raises(CacheError, match=f"{folder}/shard.json: cannot be read"):
            cache[row]


def test_skipping_most_of_a_large_epoch_draws_up_none_of_it(large):
    stream = TeacherCache.open(large).stream(3, 1, rank=2, world_size=8, skip=ROWS // 8 - 5)
    with pytest.raises(CacheError, match=r"shards/\d+/shard.json: cannot be read"):
        next(stream)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_list_of_shards_is_never_believed(tmp_path, damage):
    write_cache(tmp_path, make_draft(10))
    file = tmp_path / "index/shards.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(content[: len(content) // 3] if damage == "cut" else content))
    cache = TeacherCache.open(tmp_path)
    with pytest.raises(CacheError, match=r"index/shards.arrow") as caught:
        cache[0]
    assert "\n" not in str(caught.value)


def test_splits_are_kept_as_runs(tmp_path):
    splits = ["train"] * 90_000 + ["test"] * 9_000 + [None] * 900 + ["train"] * 100
    write_split(tmp_path, iter(splits))
    assert (tmp_path / "index/split.arrow").stat().st_size < 2_000
    for split in ("train", "test", "none"):
        expected = np.flatnonzero([name == split for name in splits])
        np.testing.assert_array_equal(find_split(tmp_path, split), expected)


def test_a_split_of_a_billion_rows_is_held_and_read_anywhere_from_little():
    runs = RowRuns(np.array([0, ROWS + 7]), np.array([ROWS, 5]))
    tracemalloc.start()
    chosen = Selection(range(2 * ROWS), runs)
    assert len(chosen) == ROWS + 5 and chosen[ROWS - 1] == ROWS - 1 and chosen[ROWS] == ROWS + 7
    assert chosen[-1] == ROWS + 11 and len(Selection(range(ROWS))) == ROWS
    np.testing.assert_array_equal(runs[ROWS - 2 :: 2], [ROWS - 2, ROWS + 7, ROWS + 9, ROWS + 11])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 4), max_size=8), seed=st.integers(0, 99))
def test_runs_of_rows_are_read_like_an_array(counts, seed):
    rng = np.random.default_rng(seed)
    gaps = rng.integers(0, 4, len(counts))
    starts = np.cumsum(gaps + counts) - counts
    rows = [
        row
        for start, count in zip(starts, counts, strict=True)
        for row in range(start, start + count)
    ]
    array, runs = np.array(rows, dtype=np.int64), RowRuns(starts, np.array(counts, dtype=np.int64))
    np.testing.assert_array_equal(runs, array)
    assert (len(runs), list(runs), runs.tolist()) == (len(rows), rows, rows)
    mask = rng.random(len(rows)) < 0.5
    for places in (slice(None, None, 2), slice(1, -1), mask, rng.permutation(len(rows))):
        np.testing.assert_array_equal(runs[places], array[places])
    with pytest.raises(IndexError):
        runs[len(rows)]


def test_an_id_is_found_among_many_without_their_shards(tmp_path):
    draft = make_draft(10)
    write_cache(tmp_path, draft)
    ids = [f"text-{row}" for row in range(10)] + [f"other-{row}" for row in range(50_000)]
    write_ids(tmp_path, ids, lambda row: ids[row])
    raw = json.loads((tmp_path / "manifest.json").read_text())
    write_sealed(tmp_path / "manifest.json", {**raw, "files": {}})
    cache = TeacherCache.open(tmp_path)
    for shard in (0, 2):
        (tmp_path / f"shards/{shard:05d}/shard.json").unlink()
    assert_same(cache.by_id("text-5"), make_example(5, draft))
    assert "text-50000" not in cache
