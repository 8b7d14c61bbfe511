"""Every command on a cache in a store: over HTTP, and in memory."""

from pathlib import Path

import fsspec
import pytest
from small_runs import make_data
from small_teachers import make_llama, save_teacher

from pipeline.cache import TeacherCache
from pipeline.storage import list_files
from stages.cache_teacher import CacheConfig, cache_teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_teacher(root / "teacher", make_llama())
    return root


@pytest.fixture(params=["memory", "s3"])
def place(request, tmp_path, monkeypatch) -> str:
    """An empty address of each kind."""
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "near"))
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://caches/0"
    return str(request.getfixturevalue("bucket").url)


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


def test_a_cache_in_a_store_is_the_one_on_the_disk(world, place, tmp_path):
    local = cache_teacher(make_config(world, str(tmp_path / "cache")), progress=False)
    remote = cache_teacher(make_config(world, place), progress=False)
    assert str(remote) == place
    assert contents(remote) == contents(local)
    assert len(TeacherCache.open(place)) == len(TeacherCache.open(local))
