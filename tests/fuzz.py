"""Hostile caches, one after another, each in bounded time and memory.

    python tests/fuzz.py --seconds 600 --seed 1         caches and views, changed at random
    python tests/fuzz_guided.py --seconds 600 --seed 1  bytes into each parser, led by coverage

A child reads them under a limit of memory; an input that crashes it, hangs, or ends in anything but
a StillroomError of one line or in data within bounds is printed by its seed and number.
"""

import argparse
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_mutations import mutate, read_files, reseal, write_base
from fuzz_views import VIEW, reseal_view, write_view_base

from pipeline.cache import CacheView, TeacherCache, read_bases
from pipeline.cache.sizes import column_bytes
from pipeline.errors import StillroomError

MEMORY = 3 * 2**30  # bytes on top of what Python and torch take
SECONDS = 10  # of the processor, for one input


def read_everything(path: Path) -> None:
    """Read all that a cache has, and assert that it is within bounds.

    Raises:
        StillroomError: it was refused.
    """
    cache = TeacherCache.open(path)
    manifest = cache.manifest
    assert len(manifest.digest) == 64
    rows = min(len(cache), 50)
    for row in range(rows):
        example = cache[row]
        _require_bounds(example, manifest)
        cache.by_id(example.example_id)
    if "split" in manifest.columns:
        for split in ("train", "test"):
            found = cache.split_indices(split)
            assert 0 <= len(found) <= len(cache) and all(0 <= r < len(cache) for r in found[:50])
    for name in list(manifest.columns)[:5]:
        for runs in cache.group(name).values():
            assert 0 < len(runs) <= len(cache)
    if len(cache) <= 1000:
        assert len(list(cache.ids())) == len(cache)
        assert len(cache.contents) == len(cache)
        assert len(list(cache.stream(seed=1, epoch=0))) == len(cache)
    if manifest.projections and not isinstance(cache, CacheView):
        read_bases(path, manifest.projections)
    if manifest.head:
        cache.read_head()
    column_bytes(cache)


def _require_bounds(example: Any, manifest: Any) -> None:
    targets, layout = example.targets, manifest.layout
    count = len(example.target_positions)
    assert targets.ids.shape == (count, layout.top_k)
    assert targets.draw_ids.shape == (count, layout.tail_draws)
    for ids in (targets.ids, targets.draw_ids):
        assert not ids.numel() or 0 <= int(ids.min()) <= int(ids.max()) < layout.num_classes
    assert isinstance(example.example_id, str)
    assert set(example.columns) == set(manifest.columns)
    labels = example.label_ids
    assert ((labels == -100) | ((labels >= 0) & (labels < layout.num_classes))).all()
    assert (example.input_ids >= 0).all() and (example.target_positions >= 0).all()
    assert int(np.sum(example.segment_lengths)) == len(example.input_ids)
    for name, vectors in example.hidden.items():
        assert vectors.dtype == torch.float32 and vectors.shape[1] == manifest.signals[name].width
        assert len(vectors) <= max(len(example.input_ids), count, 1)


class Scene(NamedTuple):
    """What is changed, mended and read.

    Attributes:
        folder: of the files that are changed.
        read: what is opened.
        reseal: mends the checksums.
        files: as they are unchanged.
    """

    folder: Path
    read: Path
    reseal: Callable[[Path], None]
    files: dict[str, bytes]


def make_scenes(folder: Path) -> list[Scene]:
    """A cache, and a view of several."""
    cache, views = folder / "cache", folder / "views"
    write_base(cache)
    write_view_base(views)
    scenes = [
        Scene(cache, cache, reseal, read_files(cache)),
        Scene(views, views / VIEW, reseal_view, read_files(views)),
    ]
    for scene in scenes:
        read_everything(scene.read)
    return scenes


class Hang(BaseException):
    """An input took too long."""


def _stop(*_: object) -> None:
    raise Hang(f"more than {SECONDS} s of the processor")


def limit_memory() -> None:
    """Let this process take no more than MEMORY from here on."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))


def run_structured(
    folder: Path, seed: int, seconds: float, inputs: int, first: int
) -> dict[str, Any]:
    """Try caches and views in turn; returns what came of them."""
    scenes = make_scenes(folder)
    limit_memory()
    signal.signal(signal.SIGPROF, _stop)
    counts = {"tried": 0, "refused": 0, "read": 0, "sealed": 0, "failed": 0}
    failures: set[str] = set()
    slowest, began = 0.0, time.monotonic()
    while counts["tried"] < inputs and time.monotonic() - began < seconds:
        number = first + counts["tried"]
        print(f"seed {seed}, input {number}", end="\r", file=sys.stderr)  # the last one crashed
        started = time.monotonic()
        try:
            scene = scenes[number % len(scenes)]
            counts[_try_one(scene, Random(f"{seed}/{number}"), counts)] += 1
        except (Exception, Hang) as error:
            counts["failed"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__} {where.filename}:{where.lineno}"
            if found not in failures:
                failures.add(found)
                print(f"seed {seed}, input {number}:", file=sys.stderr)
                traceback.print_exception(error)
        slowest = max(slowest, time.monotonic() - started)
        counts["tried"] += 1
    return {**counts, "slowest_s": round(slowest, 2), "peak_mib": _find_peak() // 2**20}


def _find_peak() -> int:
    """Bytes of memory at most; of this process alone, where ru_maxrss begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _try_one(scene: Scene, random: Random, counts: dict[str, int]) -> str:
    path, files = scene.folder, scene.files
    # Of a view there are few files, and those of its caches are changed in the other scene.
    own = {name: content for name, content in files.items() if name.startswith(f"{VIEW}/")}
    changed = mutate(own if own and random.random() < 0.7 else files, random)
    mended = random.random() < 0.8
    for name, content in changed.items():
        (path / name).write_bytes(content)
    try:
        if mended:
            scene.reseal(path)
            counts["sealed"] += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read_everything(scene.read)
            return "read"
        except StillroomError as error:
            assert "\n" not in str(error) and len(str(error)) < 20_000
            return "refused"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        for name in {*files} if mended else {*changed}:
            if (path / name).read_bytes() != files[name]:
                (path / name).write_bytes(files[name])
        for name in {*read_files(path)} - {*files}:  # renamed by their new content
            (path / name).unlink()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        found = run_structured(folder, asked.seed, asked.seconds, asked.inputs, asked.first)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found))
    raise SystemExit(found["failed"] > 0)


if __name__ == "__main__":
    main()
