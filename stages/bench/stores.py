"""A stream from an object store beside the same stream from a disk of this machine.

    a made-up cache -- copied --> s3:// on loopback -- TeacherCache.stream, one thread --> tokens/s

The store is moto's server, in a process of its own: it answers a request in milliseconds and shares
the machine, so that it is slower than what a data centre has. It needs the extra `dev`.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import fsspec
import torch

from pipeline.batches import Collator
from pipeline.cache import TargetsSpec, TeacherCache
from pipeline.storage import as_path, list_files, write_bytes
from pipeline.tasks.causal_lm import CausalLM
from stages.bench.made_up import SEQUENCE, make_draft, write_made_up
from stages.bench.measuring import Row, interleave, join_batches, rate_row, run_through
from stages.bench.setting import Setting
from stages.loopback import serve_store

_EXAMPLES, _SHARD = 192, 16
_BATCH = 8
_BUCKET = "bench"


def measure_stores(setting: Setting) -> list[Row]:
    """Two rows; none where the server is not installed."""
    if not all(find_spec(name) for name in ("moto", "flask", "s3fs")):
        return []
    draft = make_draft(_EXAMPLES, TargetsSpec(top_k=64)).model_copy(
        update={"shard_examples": _SHARD}
    )
    local = write_made_up(setting.folder / "made up stores", draft)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _run_store() as url:
            remote = as_path(url)
            for name in list_files(local.path):
                write_bytes(remote / name, (local.path / name).read_bytes())
            return _measure(setting, local.path, remote)
    finally:
        torch.set_num_threads(threads)


def _measure(setting: Setting, local: Path, remote: Path) -> list[Row]:
    def read_first() -> float:
        with (
            tempfile.TemporaryDirectory(dir=setting.folder) as near,
            _environment(STILLROOM_CACHE_DIR=near),
        ):
            return _read(remote)

    with _environment(STILLROOM_CACHE_DIR=str(setting.folder / "near")):
        sides: dict[str, Callable[[], float]] = {
            "disk": partial(_read, local),
            "first": read_first,
            "again": partial(_read, remote),
        }
        found = interleave(sides, setting.config.reads)
    tokens, against = _EXAMPLES * SEQUENCE, "the same cache on a disk"
    what = "k = 64: decode and collate from an object store on loopback"
    return [
        rate_row(f"{what}, first epoch", tokens, found["first"], against, found["disk"]),
        replace(
            rate_row(f"{what}, kept near", tokens, found["again"], against, found["disk"]),
            goal="≥ 0.9",
        ),
    ]


def _read(path: Path) -> float:
    collate = Collator(CausalLM(block_size=SEQUENCE), 0)
    cache = TeacherCache.open(path)
    return run_through(join_batches(cache.stream(seed=0, epoch=0), _BATCH, collate))


@contextmanager
def _run_store() -> Iterator[str]:
    """The address of an empty place in a store that answers until the block ends."""
    access = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    with (
        serve_store() as port,
        _environment(
            **access,
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
            AWS_DEFAULT_REGION="us-east-1",
        ),
    ):
        try:
            fsspec.filesystem("s3").mkdir(_BUCKET)
            yield f"s3://{_BUCKET}/cache"
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know this address


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
