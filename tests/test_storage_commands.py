"""Every command on a cache in a store: over HTTP, and in memory."""

import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import fsspec
import pytest
from rich.console import Console
from small_relay import Rule
from small_runs import make_data, make_student_config
from small_store import STORES, find_place
from small_teachers import make_llama, save_teacher

from pipeline.cache import TeacherCache
from pipeline.cache.verifying.whole import Depth
from pipeline.config import dump_config
from pipeline.errors import LockError
from pipeline.storage import as_path, list_files
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.inspect import inspect
from stages.train_student import train_student
from stages.verify import verify


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_teacher(root / "teacher", make_llama())
    return root


@pytest.fixture(params=STORES)
def place(request, tmp_path, monkeypatch) -> str:
    """An empty address of each kind."""
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "near"))
    return find_place(request.param, request)


def make_config(world: Path, output: str, **changes) -> CacheConfig:
    return CacheConfig.model_validate(
        {
            "output": output,
            "task": {"name": "causal-lm", "block_size": 32},
            "data": make_data(world),
            "teacher": {"model": str(world / "teacher")},
            "targets": {"top_k": 4, "temperatures": [1.0, 2.0]},
            "hidden": {"layers": [-1], "dtype": "float16"},
            "batch": {"tokens": 256},
            "shard": {"examples": 16},
            **changes,
        }
    )


def contents(path: Path) -> dict[str, bytes]:
    """The files of a cache that are a function of its inputs."""
    names = [name for name in list_files(path) if name not in ("capture.json", "config.yaml")]
    return {name: (path / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def local(world) -> Path:
    return cache_teacher(make_config(world, str(world / "cache")), progress=False)


def test_a_cache_in_a_store_is_the_one_on_the_disk(world, place, local):
    remote = cache_teacher(make_config(world, place), progress=False)
    assert str(remote) == place
    assert contents(remote) == contents(local)
    assert len(TeacherCache.open(place)) == len(TeacherCache.open(local))
    assert cache_teacher(make_config(world, place), progress=False) == remote  # stands already


def put(local: Path, place: str) -> Path:
    """Copy a cache to an address, as anybody would."""
    remote = as_path(place)
    for name in list_files(local):
        fsspec.filesystem(remote.protocol, use_listings_cache=False).pipe_file(
            f"{place}/{name}", (local / name).read_bytes()
        )
    return remote


def test_what_is_damaged_in_a_store_is_found_and_queued_again(world, place, local):
    remote = put(local, place)
    quiet = Console(file=StringIO())
    assert verify(remote, Depth(), console=quiet) == 0
    torn = bytearray((remote / "shards/00001/rows.arrow").read_bytes())
    torn[len(torn) // 2] ^= 1
    fsspec.filesystem(remote.protocol).pipe_file(f"{place}/shards/00001/rows.arrow", bytes(torn))
    said = StringIO()
    assert verify(remote, Depth(), console=Console(file=said)) == 4
    assert "shards/00001" in said.getvalue()
    assert verify(remote, Depth(), repair=True, console=quiet) == 3
    cache_teacher(make_config(world, place), progress=False)
    assert contents(remote) == contents(local)


def test_a_student_learns_from_a_store_what_it_learns_from_a_disk(place, local, tmp_path):
    remote = put(local, place)
    said = StringIO()
    inspect(remote, console=Console(file=said, width=200))
    assert place in said.getvalue()
    runs = []
    for name, cache in (("disk", str(local)), ("store", place)):
        config = make_student_config(tmp_path, tmp_path / name)
        settings = {**config.model_dump(mode="json", exclude_unset=True), "cache": cache}
        runs.append(train_student(type(config).model_validate(settings)))
    weights = [(run / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    metrics = [[(m.name, m.value) for m in evaluate(run)] for run in runs]
    assert metrics[0] == metrics[1]


@pytest.mark.skipif("STILLROOM_LONG" not in os.environ, reason="takes a minute: make torture")
def test_a_capture_that_was_killed_is_continued_and_refused_to_others_while_it_lives(
    world, bucket, local, tmp_path, monkeypatch
):
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "near"))
    config = make_config(world, bucket.url)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "stages.cli", "cache-teacher", str(file)]
    patient = {**os.environ, "STILLROOM_STORE_TIMEOUT": "600"}
    stuck = Rule("silence", "PUT", "shards/00001/rows", times=None)
    with bucket.store.broken(stuck), subprocess.Popen(command, env=patient) as process:
        while not any(served.fault for served in bucket.store.served):
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(LockError, match=str(process.pid)):
            cache_teacher(config, progress=False)
        process.kill()
    found = bucket.contents()
    assert "shards/00000/shard.json" in found and "shards/00001/shard.json" not in found
    bucket.store.served.clear()
    cache_teacher(config, progress=False)
    assert contents(as_path(bucket.url)) == contents(local)
    sent = [served.path for served in bucket.store.served if served.method == "PUT"]
    assert sent and not any("shards/00000/" in path for path in sent)
    assert list((tmp_path / "near" / "staging").iterdir()) == []
