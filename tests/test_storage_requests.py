"""What a cache in a store costs in requests: for each shard, as a number, whatever the machine."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_examples import make_draft, make_examples, write_shards
from small_relay import Served
from small_store import Bucket

from pipeline.cache import CacheWriter, TeacherCache
from pipeline.cache.verifying.whole import verify_cache
from pipeline.storage import as_path

SMALL, LARGE = 3, 12  # shards of two caches; what differs is what a shard costs
EXAMPLES = 2

Steps = dict[str, Counter[str]]


def kind(served: Served) -> str:
    return "LIST" if "list-type" in served.path else served.method


def run(bucket: Bucket, shards: int, near: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The requests of each step in the life of a cache."""
    draft = make_draft(shards * EXAMPLES, shard_examples=EXAMPLES)
    examples = make_examples(draft)
    place = bucket.below(str(shards))
    path = as_path(place.url)
    steps: Steps = {}

    def count(step: str, do: Callable[[], object], machine: str = "first") -> None:
        monkeypatch.setenv("STILLROOM_CACHE_DIR", str(near / str(shards) / machine))
        with bucket.store.broken():
            do()
            steps[step] = Counter(map(kind, bucket.store.served))

    writer = CacheWriter(path, draft)
    count("write", lambda: write_shards(writer, examples, range(shards)))
    count("resume", lambda: CacheWriter(path, draft))
    count("finish", writer.finish)
    manifest = (path / "manifest.json").read_bytes()
    place.remove("manifest.json")
    again = CacheWriter(path, draft)
    count("finish elsewhere", again.finish, "second")
    assert (path / "manifest.json").read_bytes() == manifest
    cache = TeacherCache.open(path)
    count("open", lambda: TeacherCache.open(path), "third")
    count("stream", lambda: list(cache.stream(seed=0, epoch=0)), "third")
    count("stream again", lambda: list(cache.stream(seed=0, epoch=1)), "third")
    count("verify", lambda: verify_cache(path), "fourth")
    return steps


def test_each_shard_costs_so_many_requests_and_no_more(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (run(bucket, n, tmp_path, monkeypatch) for n in (SMALL, LARGE))
    for step in large:
        large[step].subtract(small[step])
    shards = LARGE - SMALL
    each = {step: {k: n / shards for k, n in counts.items() if n} for step, counts in large.items()}
    assert each == {
        "write": {"PUT": 3, "LIST": 1, "DELETE": 1},  # rows, contents and, when they stand, .json
        "resume": {"GET": 1},
        "finish": {},
        "finish elsewhere": {"GET": 3},
        "open": {},
        "stream": {"GET": 2},
        "stream again": {},
        "verify": {"LIST": 1, "GET": 3},  # each file once
    }
