"""Caches in a store whose network fails: written whole or continued, read right or told."""

import json
import os
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_examples import (
    SIGNALS,
    assert_same,
    make_draft,
    make_example,
    make_examples,
    write_cache,
    write_shards,
)
from small_relay import QUICK, Rule, Storm
from small_store import Bucket
from torch.utils.data import DataLoader

from pipeline.batches import Selection, StepSampler
from pipeline.cache import CacheWriter, TeacherCache
from pipeline.cache.verifying.whole import verify_cache
from pipeline.errors import CacheError, StoreError
from pipeline.storage import as_path

EVERY = int(os.environ.get("STILLROOM_EVERY_REQUEST", "19"))  # 1: all of them, some minutes
DRAFT = make_draft(7, signals=SIGNALS)
EXAMPLES = make_examples(DRAFT)


@pytest.fixture(autouse=True)
def _near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "near"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The files of the same cache on a disk."""
    path = tmp_path_factory.mktemp("disk")
    write_cache(path, DRAFT, EXAMPLES)
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def stored(bucket, expected) -> Bucket:
    """The cache, put into the store."""
    for name, content in expected.items():
        bucket.replace(name, content)
    return bucket


READING = ["error", "lost-answer", "cut-body", "flip-bit", "short-body"]


def write(bucket: Bucket) -> None:
    write_cache(as_path(bucket.url), DRAFT, EXAMPLES)


def read(url: str) -> None:
    """Every example, signals and all, by row and by id."""
    cache = TeacherCache.open(url)
    for row, example in enumerate(EXAMPLES):
        assert_same(cache[row], example)
    assert_same(cache.by_id("text-5"), EXAMPLES[5])


def require_nothing_half(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """What says that a shard or the cache is whole stands only where it is."""
    for name in found:
        if name.endswith("/shard.json"):
            folder = name.removesuffix("shard.json")
            for file, (size, _) in json.loads(found[name])["files"].items():
                assert len(found[folder + file]) == size
    if "manifest.json" in found:
        assert {name: found[name] for name in expected} == expected


@pytest.mark.skipif("STILLROOM_LONG" not in os.environ, reason="takes a minute: make torture")
def test_wherever_the_store_goes_on_failing_a_later_start_completes_the_same_bytes(bucket):
    """At requests all over the writing of a small cache, by another fault each time."""
    draft = make_draft(5)
    examples = make_examples(draft)
    whole = bucket.below("whole")
    with bucket.store.broken():
        write_cache(as_path(whole.url), draft, examples)
        requests = len(bucket.store.served)
    for broken in range(0, requests, EVERY):
        fault = QUICK[broken % len(QUICK)]
        place = bucket.below(str(broken))
        with bucket.store.broken(Rule(fault, after=broken, times=None)):
            with pytest.raises(StoreError) as told:
                write_cache(as_path(place.url), draft, examples)
            assert "\n" not in str(told.value) and place.url in str(told.value)
        require_nothing_half(place.contents(), whole.contents())
        write_cache(as_path(place.url), draft, examples)
        assert place.contents() == whole.contents()


@pytest.mark.parametrize("seed", range(1))
def test_a_cache_is_written_and_read_through_a_storm(bucket, expected, monkeypatch, seed):
    """Three in ten of all requests fail."""
    monkeypatch.setenv("STILLROOM_STORE_PATIENCE", "4")
    with bucket.store.broken(Storm(0.3, seed)):
        write(bucket)
    assert bucket.contents() == expected
    with bucket.store.broken(Storm(0.3, seed)):
        read(bucket.url)


@pytest.mark.skipif("STILLROOM_LONG" not in os.environ, reason="takes a minute: make torture")
@pytest.mark.parametrize("fault", READING)
def test_any_request_of_a_reader_may_fail(stored, monkeypatch, fault):
    """Once, with nothing kept near. Small files that are read at once are not asked for twice where
    they are torn, but it is told."""
    monkeypatch.setenv("STILLROOM_CACHE_BYTES", "0")
    with stored.store.broken():
        read(stored.url)
        served = [request.path for request in stored.store.served]
    for broken in range(READING.index(fault), len(served), min(EVERY, 9)):
        path = served[broken]
        told = fault in ("flip-bit", "short-body") and not path.endswith((".arrow", "/0"))
        with stored.store.broken(Rule(fault, after=broken)):
            try:
                read(stored.url)
            except CacheError as error:
                assert told or "index/" in path, error
                assert "\n" not in str(error)


def test_a_reader_of_a_store_that_goes_on_failing_is_told(stored, monkeypatch):
    monkeypatch.setenv("STILLROOM_CACHE_BYTES", "0")
    for after in (0, 5, 9):
        with (
            stored.store.broken(Rule("error", after=after, times=None)),
            pytest.raises(StoreError, match="tries in"),
        ):
            read(stored.url)


def test_a_part_that_stays_torn_is_named(stored):
    with stored.store.broken(Rule("flip-bit", "GET", "rows.arrow", times=None)):
        with pytest.raises(CacheError, match=r"shards/00000: cannot be read \(record batch 0"):
            TeacherCache.open(stored.url)[0]
        asked = [served for served in stored.store.served if "rows.arrow" in served.path]
    assert len(asked) == 2
    read(stored.url)  # nothing torn was kept


def test_what_was_read_is_not_asked_for_again(stored, expected):
    with stored.store.broken():
        read(stored.url)
        sent = sum(served.sent for served in stored.store.served)
        assert sent < 2 * sum(map(len, expected.values()))
        stored.store.served.clear()
        read(stored.url)
    assert not any("/shards/" in served.path for served in stored.store.served)


def test_another_cache_at_the_same_address_is_not_taken_for_the_first(stored, tmp_path):
    read(stored.url)
    other = make_draft(7, signals=SIGNALS, num_classes=40)
    examples = make_examples(other)
    write_cache(tmp_path / "other", other, examples)
    for file in (tmp_path / "other").rglob("*"):
        if file.is_file():
            stored.replace(file.relative_to(tmp_path / "other").as_posix(), file.read_bytes())
    assert_same(TeacherCache.open(stored.url)[3], examples[3])


def test_the_local_folder_stays_within_its_bytes(stored, tmp_path, monkeypatch):
    limit = 2**16
    monkeypatch.setenv("STILLROOM_CACHE_BYTES", str(limit))
    for name in ("a", "b", "c"):
        for file, content in stored.contents().items():
            if "/" not in file or file.split("/")[0] in ("shards", "index"):
                stored.replace(f"{name}/{file}", content)
        read(f"{stored.url}/{name}")
        kept = [file for file in (tmp_path / "near").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in kept) <= limit


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-7],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
    ids=["torn", "emptied", "zeros", "one bit"],
)
def test_what_suffered_near_is_fetched_again(stored, tmp_path, harm):
    read(stored.url)
    for file in (tmp_path / "near" / "ranges").rglob("*"):
        if file.is_file():
            file.write_bytes(harm(file.read_bytes()))
    with stored.store.broken():
        read(stored.url)
        assert any("/rows.arrow" in served.path for served in stored.store.served)
        stored.store.served.clear()
        read(stored.url)  # what was fetched took its place
    assert not any("/shards/" in served.path for served in stored.store.served)


def test_a_local_folder_that_cannot_be_written_costs_time_alone(stored, monkeypatch):
    monkeypatch.setenv("STILLROOM_CACHE_DIR", "/proc/nothing")
    read(stored.url)


def test_verify_reads_a_store_once_and_asks_again_for_what_comes_torn(stored, expected, tmp_path):
    shards = sum(len(content) for name, content in expected.items() if name.startswith("shards/"))
    with stored.store.broken():
        assert verify_cache(as_path(stored.url)).state == "whole"
        reads = [one for one in stored.store.served if one.method == "GET" and "00" in one.path]
    assert sum(one.sent for one in reads if "list-type" not in one.path) == shards
    for name in ("shard.json", "rows.arrow"):
        with stored.store.broken(Rule("flip-bit", "GET", f"00000/{name}")):
            assert verify_cache(as_path(stored.url)).state == "whole"
        with stored.store.broken(Rule("flip-bit", "GET", f"00000/{name}", times=None)):
            assert verify_cache(as_path(stored.url)).damaged_shards == [0]
    assert not list((tmp_path / "near/staging").iterdir())


def test_verify_reads_a_store_where_nothing_can_be_written(stored, monkeypatch):
    monkeypatch.setenv("STILLROOM_CACHE_DIR", "/proc/nothing")
    assert verify_cache(as_path(stored.url)).state == "whole"
    rows = stored.contents()["shards/00001/rows.arrow"]
    stored.replace("shards/00001/rows.arrow", rows[:-40] + bytes(40))
    assert verify_cache(as_path(stored.url)).damaged_shards == [1]


def test_an_object_below_another_which_no_folder_can_hold_is_told(stored):
    raw = json.loads(stored.contents()["shards/00000/shard.json"])
    raw.pop("checksum")
    raw["files"]["rows.arrow/inside"] = [1, sha256(b"x").hexdigest()]
    stored.replace("shards/00000/rows.arrow/inside", b"x")
    stored.replace("shards/00000/shard.json", json.dumps(raw).encode())
    stored.remove("manifest.json")  # whose index knows the other shard.json
    told = [str(finding) for finding in verify_cache(as_path(stored.url)).findings]
    assert any("rows.arrow/inside: has a name that this machine cannot hold" in one for one in told)


def test_workers_of_a_loader_read_from_a_store(stored):
    """Forked, beside the connections and threads of the parent."""
    cache = TeacherCache.open(stored.url)
    assert_same(cache[0], EXAMPLES[0])
    loader = DataLoader(
        Selection(cache), batch_size=3, num_workers=2, multiprocessing_context="fork",
        collate_fn=list,
    )  # fmt: skip
    found = [example for batch in loader for example in batch]
    assert [example.example_id for example in found] == [e.example_id for e in EXAMPLES]
    assert torch.equal(found[6].targets.ids, cache[6].targets.ids)


def test_a_shard_that_lost_a_file_in_the_store_is_written_again(bucket, expected):
    write(bucket)
    bucket.remove("manifest.json")
    bucket.remove("shards/00001/rows.arrow")
    with bucket.store.broken():
        writer = CacheWriter(as_path(bucket.url), DRAFT)
        listed = [served for served in bucket.store.served if "list-type" in served.path]
    assert writer.finished == {0}
    assert len(listed) < 8
    write_shards(writer, EXAMPLES, [1])
    writer.finish()
    assert bucket.contents() == expected


def delivered(bucket: Bucket) -> list[str]:
    """The paths of the ranges that were asked for, whose bytes are the cache's own."""
    return [
        served.path for served in bucket.store.served if served.path.endswith(("rows.arrow", "/0"))
    ]


def test_a_stream_asks_ahead_for_each_part_once(bucket, tmp_path, monkeypatch):
    draft = make_draft(90, signals=SIGNALS, shard_examples=18)
    examples = make_examples(draft)
    write_cache(as_path(bucket.url), draft, examples)
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "other machine"))
    cache = TeacherCache.open(bucket.url)
    with bucket.store.broken():
        found = [(e.example_id, e.hidden["layer.0"]) for e in cache.stream(seed=1, epoch=0)]
        first = delivered(bucket)
    assert sorted(name for name, _ in found) == sorted(e.example_id for e in examples)
    rows = [path for path in first if path.endswith("rows.arrow")]
    assert len(rows) == len(set(rows)) == 5  # one record batch in each shard
    assert len([path for path in first if "layer.0" in path]) == 10  # a list of chunks, and a chunk
    assert not [path for path in first if "pooled" in path or "layer.-1" in path]  # nobody asked
    with bucket.store.broken():
        assert len(list(TeacherCache.open(bucket.url).stream(seed=1, epoch=1))) == 90
        assert delivered(bucket) == []


def test_what_lies_between_two_parts_comes_with_them(bucket, tmp_path, monkeypatch):
    draft = make_draft(6, shard_examples=6)
    long = [make_example(row, draft, tokens=4000) for row in range(6)]  # a record batch each
    write_cache(as_path(bucket.url), draft, long)
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "other machine"))
    cache = TeacherCache.open(bucket.url)
    bucket.store.served.clear()
    cache.read_ahead(np.array([4, 0, 2]))
    while not delivered(bucket):
        time.sleep(0.01)
    for row in range(5):
        assert_same(cache[row], long[row])
    assert len(delivered(bucket)) == 1
    assert_same(cache[5], long[5])
    assert len(delivered(bucket)) == 2


def test_a_loader_without_workers_asks_ahead_and_gives_what_a_disk_gives(
    bucket, tmp_path, monkeypatch
):
    draft = make_draft(40, shard_examples=8)
    write_cache(as_path(bucket.url), draft, make_examples(draft))
    write_cache(tmp_path / "disk", draft, make_examples(draft))
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "other machine"))
    bucket.store.served.clear()
    orders = []
    for path in (bucket.url, tmp_path / "disk"):
        train = Selection(TeacherCache.open(path))
        ahead = train.read_ahead if train.is_remote else None
        sampler = StepSampler(len(train), 4, seed=3, ahead=ahead)
        loader = DataLoader(train, batch_sampler=sampler, collate_fn=list)
        orders.append([[example.example_id for example in batch] for batch in loader])
    assert orders[0] == orders[1]
    assert sorted(delivered(bucket)) == sorted(set(delivered(bucket)))
    assert len(delivered(bucket)) == 5
