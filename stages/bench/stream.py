"""How fast a student is fed, on one thread, and that neither size nor place changes what it costs.

    made-up caches of V = 131,072 -- stream, Collator --> tokens/s    against Parquet by `datasets`
    hidden states                 -- stream --> GB/s                  against Zarr's own reader
    orders and manifests alone    -- shuffling, resuming, opening of 10^9 rows in 10^5 shards
    caches of 10^5, 10^6, 10^7 tokens -- the scale: bytes per token, tokens/s written and read

Every read begins with nothing decoded; the files are in the system's page cache.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.batches import Collator, StepSampler
from pipeline.cache import STREAM_BLOCK, EpochOrder, TargetsSpec, TeacherCache, epoch_order
from pipeline.cache.manifest import read_shard
from pipeline.cache.shards import ROWS, shard_folder
from pipeline.errors import CacheError
from pipeline.storage import RangeReader
from pipeline.tasks.causal_lm import CausalLM
from stages.bench.baselines import join_table, open_parquet, write_parquet
from stages.bench.made_up import SEQUENCE, make_draft, write_made_up, write_manifest
from stages.bench.measuring import (
    Row,
    interleave,
    join_batches,
    rate_row,
    run_through,
    time_row,
)
from stages.bench.setting import Setting

_BATCH = 8
_EXAMPLES = 96  # of a speed's cache
_WIDTH = 1024
_KINDS = {
    "k = 64": TargetsSpec(top_k=64, temperatures=(1.0, 2.0)),
    "8 + 4": TargetsSpec(top_k=8, tail_draws=4, temperatures=(1.0, 2.0)),
}
_COMPRESSIONS = ("zstd", "lz4", "none")
_GOALS = {"k = 64": "5 M", "8 + 4": "12 M"}
_LARGE_ROWS, _LARGE_SHARDS = 10**9, 10**5
_STEPS = 10**6  # taken before a run continues
_SHUFFLED = 2**20  # rows of the orders whose mixing is measured
_MIXED = 32  # examples of a batch
_PAGE = 4096  # bytes of memory that are mapped at once

Scale = dict[str, float]


def measure_stream(setting: Setting) -> tuple[list[Row], list[Scale]]:
    """Rows, and the scale: one entry for each number of tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for name, targets in _KINDS.items():
            rows += _measure_targets(setting, name, targets)
        rows += [_measure_hidden(setting), *_measure_mixing(), *_measure_bookkeeping(setting)]
        scale = [_measure_scale(setting, tokens) for tokens in setting.config.scale_tokens]
    finally:
        torch.set_num_threads(threads)
    return rows, scale


def measure_mixing(order: np.ndarray, run: int, seed: int = 0) -> float:
    """How much better mixed batches could be: 1 where they are as good as a full shuffle's.

    A quantity that is one random number for each `run` of neighbouring rows (a document, a topic)
    is averaged over batches of consecutive places; the variance of these averages, over the one
    that independent rows have.
    """
    values = np.random.default_rng(seed).normal(size=-(-len(order) // run)).repeat(run)[order]
    means = values[: len(order) // _MIXED * _MIXED].reshape(-1, _MIXED).mean(axis=1)
    return float(means.var() * _MIXED / values.var())


def show_scale(scale: Sequence[Scale], console: Console) -> None:
    """Print one line for each number of tokens."""
    table = Table(title="scale, 8 + 4 at V = 131,072", title_justify="left", box=SIMPLE_HEAD)
    for name in scale[0]:
        table.add_column(name, justify="right")
    for line in scale:
        table.add_row(*(f"{v:,.0f}" if v >= 100 else f"{v:.2f}" for v in line.values()))
    console.print(table)


def _measure_targets(setting: Setting, name: str, targets: TargetsSpec) -> list[Row]:
    caches = {}
    for compression in _COMPRESSIONS:
        spec = targets.model_copy(update={"compression": compression})
        other = "" if spec == targets else f" {compression}"
        path = setting.folder / f"made up {name}{other}"
        caches[compression] = write_made_up(path, make_draft(_EXAMPLES, spec))
    first = caches[_COMPRESSIONS[0]]
    file = write_parquet(first, first.path.with_suffix(".parquet"))
    table = open_parquet(file, setting.folder / "datasets").with_format("arrow")
    order = epoch_order(_EXAMPLES, STREAM_BLOCK, 0, 0)
    picks = np.random.default_rng(0).permutation(_EXAMPLES)[:32].tolist()

    def read_whole() -> float:
        batches = (order[at : at + _BATCH].tolist() for at in range(0, len(order), _BATCH))
        return run_through(join_table(table[rows]) for rows in batches)

    def read(cache: TeacherCache, late: bool) -> float:
        return run_through(_batches(_open(cache), late))

    def pick(cache: TeacherCache) -> float:
        opened = _open(cache)
        opened[0].targets  # noqa: B018  (opens the shard)
        return run_through(opened[row].targets for row in picks)

    sides: dict[str, Callable[[], float]] = {
        "whole": read_whole,
        "pick": lambda: run_through(join_table(table[[row]]) for row in picks),
    }
    for compression, cache in caches.items():
        sides[f"whole {compression}"] = partial(read, cache, False)
        sides[f"codes {compression}"] = partial(read, cache, True)
        sides[f"pick {compression}"] = partial(pick, cache)
        sides[f"sums {compression}"] = partial(_compare_sums, cache)
    found = interleave(sides, setting.config.reads)
    return [row for kind, one in caches.items() for row in _list_rows(name, kind, one, found)]


def _list_rows(
    name: str, compression: str, cache: TeacherCache, found: dict[str, list[float]]
) -> list[Row]:
    total, goal = cache.manifest.totals, _GOALS[name]
    what = f"{name}, {compression} at {total.bytes / total.tokens:.0f} B/token:"
    against = "the same content as lists in Parquet, whole batches"
    against += " by `datasets` in arrow format: its fastest way; no padding"
    tokens = _EXAMPLES * SEQUENCE
    whole, codes, pick = (found[f"{side} {compression}"] for side in ("whole", "codes", "pick"))
    shown = time_row(f"{what} one of 1,024 at random", "µs", 1e6 / 32, pick, against, found["pick"])
    return [
        rate_row(
            f"{what} decode and collate, one thread", tokens, whole, against, found["whole"], goal
        ),
        rate_row(
            f"{what} collate in codes, left to a device", tokens, codes, "decoded as well", whole
        ),
        replace(shown, goal="300 µs"),
        time_row(
            f"{what} checksums of the batches that are read, once mapped",
            "ms",
            1e3,
            found[f"sums {compression}"],
            "reading and decoding them",
            whole,
            "≤ 0.03",
        ),
    ]


def _measure_hidden(setting: Setting) -> Row:
    draft = make_draft(_EXAMPLES // 2, _KINDS["8 + 4"], _WIDTH)
    cache = write_made_up(setting.folder / "made up hidden", draft)
    counts = np.cumsum([0] + [SEQUENCE - 1] * len(cache))
    stored = float(counts[-1] * _WIDTH * 2)

    def read_ours() -> float:
        return run_through(e.hidden["layer.4"] for e in _open(cache).stream(0, 0, shuffle=False))

    def read_theirs() -> float:
        array: Any = zarr.open_group(cache.path / "shards/00000/hidden.zarr", mode="r")["layer.4"]
        parts = (array[a:b] for a, b in pairwise(counts))
        return run_through(torch.from_numpy(part).float() for part in parts)

    found = interleave({"ours": read_ours, "theirs": read_theirs}, setting.config.reads)
    what, megabytes = "hidden states in order, stored float16, one thread", round(stored / 1e6)
    row = rate_row(what, megabytes, found["ours"], "Zarr's own reader", found["theirs"])
    return replace(row, unit="MB/s", goal="1,000")


def _measure_mixing() -> list[Row]:
    order = EpochOrder(_SHUFFLED, STREAM_BLOCK, 0, 0)[:]
    full = np.random.default_rng(0).permutation(_SHUFFLED)
    against = f"a full shuffle; batches of {_MIXED}, 1 is perfect"
    what = "variance of a batch's mean, neighbours alike in runs of"
    found = [(run, measure_mixing(order, run), measure_mixing(full, run)) for run in (8, 64)]
    return [Row(f"{what} {run}", "ratio", ours, best, against) for run, ours, best in found]


def _measure_bookkeeping(setting: Setting) -> list[Row]:
    large = setting.folder / "made up large"
    draft = make_draft(_LARGE_ROWS, _KINDS["8 + 4"])
    write_manifest(large, draft.model_copy(update={"shard_examples": _LARGE_ROWS // _LARGE_SHARDS}))
    small = setting.folder / "made up 8 + 4"

    sides = {
        "large": lambda: _open_and_look(large),
        "small": lambda: _open_and_look(small),
        "ten": lambda: sum(_open_and_look(large) for _ in range(10)),
        "late": lambda: _take_step(_STEPS),
        "first": lambda: _take_step(0),
    }
    found = interleave(sides, setting.config.reads)
    large_is = "10^5 shards, 10^9 rows"
    return [
        time_row(
            f"open {large_is}, look for a shard",
            "ms",
            1e3,
            found["large"],
            f"one shard of {_EXAMPLES} rows, and the example read",
            found["small"],
            goal="1 s",
        ),
        time_row(
            f"ten of these: {large_is}",
            "ms",
            1e3,
            found["ten"],
            "one",
            found["large"],
            goal="≤ 10",
        ),
        time_row(
            "rows of the step after 10^6 steps, of 10^9 rows",
            "ms",
            1e3,
            found["late"],
            "those of the first step",
            found["first"],
            goal="1 s",
        ),
    ]


def _open_and_look(path: Path) -> float:
    began = time.perf_counter()
    cache = TeacherCache.open(path)
    with suppress(CacheError):  # a made-up list of shards has none
        cache[0]
    return time.perf_counter() - began


def _take_step(skipped: int) -> float:
    began = time.perf_counter()
    sampler = StepSampler(_LARGE_ROWS, 16, seed=time.perf_counter_ns())  # nothing computed before
    list(next(islice(iter(sampler), skipped, None)))
    return time.perf_counter() - began


def _measure_scale(setting: Setting, tokens: int) -> Scale:
    began = time.perf_counter()
    draft = make_draft(-(-tokens // SEQUENCE), _KINDS["8 + 4"])
    cache = write_made_up(setting.folder / f"scale {tokens}", draft)
    written = time.perf_counter() - began
    total = cache.manifest.totals
    read = min(run_through(_batches(_open(cache))) for _ in range(2))
    return {
        "tokens": float(total.tokens),
        "bytes/token": total.bytes / total.tokens,
        "written tokens/s": total.tokens / written,
        "read tokens/s": total.tokens / read,
    }


def _compare_sums(cache: TeacherCache) -> float:
    """Seconds that the checksums of an epoch take by themselves, of bytes that are mapped: to touch
    a page first takes longer than its sum, and whoever decodes it has to do that anyway."""
    seconds = 0.0
    for index in range(cache.manifest.num_shards):
        folder = shard_folder(cache.path, index)
        rows = RangeReader(folder / ROWS)
        for _, start, size, _ in read_shard(folder).batches:
            content = rows.read(start, size)
            np.frombuffer(content, np.uint8)[::_PAGE].max()
            began = time.perf_counter()
            google_crc32c.value(content)
            seconds += time.perf_counter() - began
    return seconds


def _open(cache: TeacherCache) -> TeacherCache:
    return TeacherCache.open(cache.path)


def _batches(cache: TeacherCache, late: bool = False) -> Iterable[Any]:
    collate = Collator(CausalLM(block_size=SEQUENCE), 0, decode_late=late)
    return join_batches(cache.stream(seed=0, epoch=0), _BATCH, collate)
