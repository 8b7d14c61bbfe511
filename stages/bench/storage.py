"""Bytes per token by codec and column, and how fast a cache is read.

    measure_sizes    lossless cache -- recode --> steps, lossless     against 6 bytes an entry
    measure_reading  TeacherCache + Collator                          against Parquet by `datasets`

Every read begins with nothing decompressed; the files are in the system's page cache, ours and
theirs.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batches import Collator
from pipeline.cache import (
    CODECS,
    STREAM_BLOCK,
    CacheWriter,
    Codec,
    Draft,
    TargetsSpec,
    TeacherCache,
    epoch_order,
)
from pipeline.cache.codecs import Lossless, Steps
from pipeline.cache.sizes import FRAMING, column_bytes
from stages.bench.baselines import join_rows, join_table, open_parquet, write_parquet
from stages.bench.measuring import (
    Row,
    interleave,
    join_batches,
    rate_row,
    run_through,
    time_row,
)
from stages.bench.setting import Setting

_NAIVE_BYTES = 6  # int32 id, float16 logit
_STEP = 8  # rows between two random reads: a record batch of the demo holds no more


def measure_sizes(setting: Setting) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Rows of bytes per token, and for each cache its bytes per token by column of rows.arrow.

    Index, tokenizer and settings are left out: their share falls with the size of a cache.
    """
    config = setting.config
    wide = TargetsSpec(top_k=config.wide_k, temperatures=config.temperatures)
    rows: list[Row] = []
    columns: dict[str, dict[str, float]] = {}
    for targets in (config.targets, wide):
        kept = f"top {targets.top_k}"
        if targets.tail_draws:
            kept += f" + {targets.tail_draws} draws"
        setting.capture("lossless", targets.model_copy(update={"codec": Lossless()}))
        for name in CODECS:
            codec = CODECS[name].model_validate({"name": name})
            cache = recode(setting.open("lossless"), setting.folder / f"{name} {kept}", codec)
            codec = cache.manifest.targets.codec
            columns[f"{kept}: {name}"] = sizes = _bytes_per_token(cache)
            rows += _size_rows(kept, codec, cache, sizes)
    return rows, columns


def recode(cache: TeacherCache, path: Path, codec: Codec) -> TeacherCache:
    """Write the examples of a lossless cache with another codec; nothing is asked again."""
    manifest = cache.manifest
    fields = manifest.model_dump(mode="json", include=set(Draft.model_fields))
    draft = Draft.model_validate(fields)
    targets = draft.targets.model_copy(update={"codec": codec.resolve(draft.layout.top_k)})
    writer = CacheWriter(path, draft.model_copy(update={"targets": targets}))
    for index in range(draft.num_shards):
        first = index * draft.shard_examples
        with writer.shard(index) as shard:
            for row in range(first, first + draft.shard_size(index)):
                shard.add(cache[row])
    writer.finish()
    return TeacherCache.open(path)


def measure_reading(setting: Setting) -> list[Row]:
    """Streams, whole epochs, and single examples, of the caches that `measure_capture` left."""
    rows = []
    for name, what in (("plain", "targets"), ("hidden", "targets + 2 hidden layers")):
        file = write_parquet(setting.open(name), setting.folder / f"{name}.parquet")
        table = open_parquet(file, setting.folder / "datasets")
        sides = _reading_sides(setting, name, table)
        found = interleave(sides, setting.config.reads)
        ours_size, their_size = setting.open(name).manifest.totals.bytes, file.stat().st_size
        against = "the same content as lists in Parquet, read by `datasets` in numpy format"
        fastest = "the same file, whole batches in arrow format: its fastest way; no padding"
        per_token = (ours_size / setting.tokens, their_size / setting.tokens)
        rows.append(Row(f"shards of {what}", "bytes/token", *per_token, against=against))
        for order in ("in order", "shuffled"):
            ours, theirs = found[f"ours {order}"], found[f"theirs {order}"]
            label, count = f"read {what}, {order}", setting.tokens
            rows.append(rate_row(label, count, ours, against, theirs))
            rows.append(rate_row(label, count, ours, fastest, found[f"arrow {order}"]))
        per_example = 1e6 / len(_random_rows(setting))
        ours, theirs = found["ours one by one"], found["theirs one by one"]
        label = f"read one example at random, {what}"
        rows.append(time_row(label, "µs", per_example, ours, against, theirs))
    return rows


def _reading_sides(setting: Setting, name: str, table: Any) -> dict[str, Callable[[], float]]:
    size = setting.config.read_batch
    signals = {signal: signal for signal in setting.open(name).manifest.signals}
    collate = Collator(setting.task, setting.tokenizer.pad_token_id or 0, signals)
    shuffled = epoch_order(np.arange(len(table)), STREAM_BLOCK, 0, 0)  # as stream() visits them
    whole = table.with_format("arrow")
    single = _random_rows(setting)

    def stream(shuffle: bool) -> float:
        cache = setting.open(name)
        return run_through(
            join_batches(cache.stream(seed=0, epoch=0, shuffle=shuffle), size, collate)
        )

    def pick() -> float:
        cache = setting.open(name)
        return run_through(cache[row].targets for row in single)

    def rows_of(order: Iterable[int]) -> Iterable[Any]:
        return (table[int(row)] for row in order)

    def batches_of(order: Iterable[int]) -> Iterable[Any]:
        rows = [int(row) for row in order]
        return (join_table(whole[rows[at : at + size]]) for at in range(0, len(rows), size))

    return {
        "ours in order": lambda: stream(False),
        "theirs in order": lambda: run_through(
            join_batches(rows_of(range(len(table))), size, join_rows)
        ),
        "ours shuffled": lambda: stream(True),
        "theirs shuffled": lambda: run_through(join_batches(rows_of(shuffled), size, join_rows)),
        "arrow in order": lambda: run_through(batches_of(range(len(table)))),
        "arrow shuffled": lambda: run_through(batches_of(shuffled)),
        "ours one by one": pick,
        "theirs one by one": lambda: run_through(rows_of(single)),
    }


def _random_rows(setting: Setting) -> list[int]:
    """Rows far enough apart that none finds its record batch decompressed by another."""
    rows = np.arange(0, len(setting.examples), _STEP)
    return [int(row) for row in np.random.default_rng(0).permutation(rows)]


def _bytes_per_token(cache: TeacherCache) -> dict[str, float]:
    tokens = cache.manifest.totals.tokens
    found = column_bytes(cache).items()
    return {name: size / tokens for name, size in found if name[0] != "(" or name == FRAMING}


def _size_rows(kept: str, codec: Codec, cache: TeacherCache, sizes: dict[str, float]) -> list[Row]:
    """Targets alone, and for the default codec with the inputs that a student needs."""
    layout = cache.manifest.layout
    own = set(codec.columns(layout))
    entries = layout.top_k + layout.tail_draws
    naive, against = (
        float(_NAIVE_BYTES * entries),
        "computed: int32 id + float16 logit for every entry, nothing else",
    )
    rows = [
        Row(
            what=f"{kept}: codec {codec.name}",
            unit="bytes/token",
            measured=sum(size for name, size in sizes.items() if name in own),
            baseline=naive,
            against=against,
        )
    ]
    if isinstance(codec, Steps):
        what = f"{kept}: codec {codec.name} and inputs"
        total = sum(sizes.values())
        rows.append(Row(what, "bytes/token", total, naive, against))
    return rows
