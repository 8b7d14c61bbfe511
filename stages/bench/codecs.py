"""Bytes against error: the codecs, and the records of others, over logits of several class spaces.

    spaces -- keep_targets --> Targets -- cache with a codec, rival's record --> Point
    the points of the default codec -- goals --> Row, a table of its own

Bytes are all-in: every column of the targets, the framing of the file, and shard.json in a shard of
the default size; inputs stand beside. An error is KL(teacher || decoded) with one outcome for what
is not kept.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.cache import CODECS, CacheWriter, Codec, Draft, Identity, TargetsSpec, TeacherCache
from pipeline.cache.codecs import Lossless, Steps
from pipeline.cache.shards import SHARD, shard_folder
from pipeline.cache.sizes import FRAMING, column_bytes
from pipeline.examples import CachedExample
from pipeline.targets import UNLABELLED, Targets
from stages.bench.rivals import RIVALS
from stages.bench.setting import Setting
from stages.bench.spaces import TEMPERATURES, Source, keep_targets, list_spaces
from stages.sizes import ShardConfig

_KEPT = ((128, 0), (8, 4), (0, 12))  # asked for; 64 and 50 are the first of 128
_SHOWN = ((50, 0), (64, 0), (128, 0), (8, 4), (0, 12))
_CURVE = (0.35, 0.5, 0.7, 1.4, 2.0, 2.8)  # of the default number of levels, at K = 64
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # of the teacher's logits
_SEQUENCE = 1024


@dataclass(frozen=True)
class Point:
    """One record of one kind of target.

    Attributes:
        source: where the logits come from; kept: how many entries; record: who keeps them how.
        bytes, inputs: per target; None where inputs are not measured.
        kl: mean nats at each temperature, None where the record has no normaliser for it; p99: the
            99th percentile; mass: the largest error of the kept mass at any; changed: the share of
            targets whose first choice is another.
        rate: targets a second through an opened cache, decompressed, checked and decoded.
    """

    source: str
    kept: str
    record: str
    bytes: float
    inputs: float | None = None
    kl: tuple[float, ...] = ()
    p99: tuple[float, ...] = ()
    mass: float | None = None
    changed: float | None = None
    rate: float | None = None


def measure_codecs(setting: Setting) -> tuple[list[Source], list[Point]]:
    """Every codec and every rival, in every class space."""
    sources: list[Source] = []
    points: list[Point] = []
    for space in list_spaces(setting):
        asked, certainty = keep_targets(space, _KEPT)
        sources.append((space, certainty))
        for top_k, draws in _SHOWN:
            kept = asked[(128, 0)] if draws == 0 else asked[(top_k, draws)]
            points += _measure_kept(setting.folder, space.name, _keep_first(kept, top_k))
    return sources, points


def show_points(points: Sequence[Point], whole: str, console: Console) -> None:
    """Print the curve of every class space, and of the space `whole` all that was kept."""
    groups = dict.fromkeys(
        (point.source, point.kept)
        for point in points
        if whole == point.source or point.kept == "64"
    )
    for source, kept in groups:
        table = Table(
            title=f"bytes against error: {kept} kept, {source}",
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("record", no_wrap=True)
        for heading in ("bytes", "inputs", "KL T=1", "p99", "KL T=2", "p99", "/s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for point in points:
            if (point.source, point.kept) == (source, kept):
                table.add_row(*_cells(point))
        console.print(table)
        console.print()


def _cells(point: Point) -> list[str]:
    cells = [point.record, f"{point.bytes:.1f}"]
    cells.append("" if point.inputs is None else f"+{point.inputs:.1f}")
    for index in range(len(TEMPERATURES)):
        known = index < len(point.kl)
        cells += [f"{p[index]:.1e}" if known else "" for p in (point.kl, point.p99)]
    cells.append("" if point.rate is None else f"{point.rate / 1e6:.2f} M")
    return cells


def list_points(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points as JSON."""
    return [asdict(point) for point in points]


def _keep_first(targets: Targets, top_k: int) -> Targets:
    """The first `top_k` of what was kept, the highest logit first."""
    return replace(targets, ids=targets.ids[:, :top_k], logits=targets.logits[:, :top_k])


def _measure_kept(folder: Path, source: str, targets: Targets) -> list[Point]:
    top_k, draws = targets.ids.shape[1], targets.draw_ids.shape[1]
    kept = f"{top_k} + {draws} draws" if top_k and draws else f"{top_k or draws}"
    kept = f"{draws} draws" if not top_k else kept
    points = []
    if top_k and not draws:
        log_probs = targets.at(1.0).log_probs.double().numpy()
        for name, keep in RIVALS.items():
            size, decoded = keep(targets.ids.numpy(), log_probs, targets.num_classes)
            kl, p99, *others = _compare(log_probs, decoded)
            points.append(Point(source, kept, name, size, None, (kl,), (p99,), *others))
    else:
        naive = 6.0 * (top_k + draws)
        points.append(Point(source, kept, "int32 + float16", naive))
    codecs: list[Codec] = [CODECS[name].model_validate({"name": name}) for name in CODECS]
    if (top_k, draws) == (64, 0):
        levels = Steps().resolve(top_k).levels or 0
        codecs += [Steps(levels=round(part * levels)) for part in _CURVE]
    path = folder / "codec"
    points += [_measure_codec(path, source, kept, codec, targets) for codec in codecs]
    if (top_k, draws) == (64, 0):
        for name, dtype in _HALVES.items():
            rounded = replace(targets, logits=targets.logits.to(dtype).float())
            point = _measure_codec(path, source, kept, Lossless(), rounded)
            points.append(replace(point, record=f"lossless, {name}"))
    return points


def _measure_codec(path: Path, source: str, kept: str, codec: Codec, targets: Targets) -> Point:
    cache = _write_cache(path, codec, targets)
    codec = cache.manifest.targets.codec
    count = cache.manifest.totals.targets
    sizes = column_bytes(cache)
    own = set(codec.columns(cache.manifest.layout))
    inputs = sum(size for name, size in sizes.items() if name not in own and name[0] != "(")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the rate is that of one core
    began = time.perf_counter()
    decoded = Targets.cat([cache[row].targets for row in range(len(cache))])
    seconds = time.perf_counter() - began
    torch.set_num_threads(threads)
    found = [_compare_at(targets.select(slice(count)), decoded, t) for t in TEMPERATURES]
    record = codec.name if not isinstance(codec, Steps) else f"steps, {codec.levels} levels"
    known = [one for one in found if one is not None]
    return Point(
        source=source,
        kept=kept,
        record=record,
        bytes=(sum(sizes[name] for name in own) + sizes[FRAMING]) / count + _share_ranking(path),
        inputs=inputs / count,
        kl=tuple(kl for kl, *_ in known),
        p99=tuple(p99 for _, p99, *_ in known),
        mass=max((mass for *_, mass, _ in known), default=None),
        changed=max((changed for *_, changed in known), default=None),
        rate=count / seconds,
    )


def _share_ranking(path: Path) -> float:
    """Bytes of a shard's own file, in a shard of the default size."""
    return (shard_folder(path, 0) / SHARD).stat().st_size / ShardConfig().tokens


def _compare_at(
    truth: Targets, decoded: Targets, temperature: float
) -> tuple[float, float, float, float] | None:
    if truth.ids.shape[1] == 0:
        return None
    sides = []
    for targets in (truth, decoded):
        order = targets.ids.argsort(dim=1)
        sides.append(targets.at(temperature).log_probs.gather(1, order).double().numpy())
    return _compare(*sides)


def _compare(truth: np.ndarray, decoded: np.ndarray) -> tuple[float, float, float, float]:
    """Mean and 99th percentile of KL(truth || decoded), largest error of the kept mass, share of
    rows where the largest of the decoded is not the largest of the truth."""
    p, q = np.exp(truth), np.exp(decoded)
    kept, found = p.sum(axis=1), q.sum(axis=1)
    tail, left = (np.maximum(1 - mass, 1e-9) for mass in (kept, found))
    kl = (p * (truth - decoded)).sum(axis=1) + tail * np.log(tail / left)
    chosen = np.take_along_axis(truth, decoded.argmax(axis=1)[:, None], axis=1)[:, 0]
    changed = chosen < truth.max(axis=1)
    mass = np.abs(kept - found).max()
    return float(kl.mean()), float(np.quantile(kl, 0.99)), float(mass), float(changed.mean())


def _write_cache(path: Path, codec: Codec, targets: Targets) -> TeacherCache:
    """A cache of sequences of 1,024 targets; the token at each is the label of the one before."""
    shutil.rmtree(path, ignore_errors=True)
    size = min(_SEQUENCE, len(targets))
    count = len(targets) // size
    nobody: dict[str, Any] = {"digest": "synthetic"}
    top_k, draws = targets.ids.shape[1], targets.draw_ids.shape[1]
    draft = Draft(
        identity=Identity(data=nobody, preprocessing=nobody, tokenizer=nobody, teacher=nobody),
        task={"name": "causal-lm"},
        targets=TargetsSpec(top_k=top_k, tail_draws=draws, temperatures=TEMPERATURES, codec=codec),
        num_classes=targets.num_classes,
        shifted=False,
        shard_examples=count,
        num_examples=count,
    )
    writer = CacheWriter(path, draft)
    with writer.shard(0) as shard:
        for row in range(count):
            shard.add(_make_example(row, targets.select(slice(row * size, (row + 1) * size))))
    writer.finish()
    return TeacherCache.open(path)


def _make_example(row: int, targets: Targets) -> CachedExample:
    labels = targets.label_ids.numpy().astype(np.int32)
    assert UNLABELLED not in labels
    return CachedExample(
        example_id=str(row),
        input_ids=labels,
        segment_lengths=np.array([len(labels)], dtype=np.int32),
        target_positions=np.arange(len(labels), dtype=np.int32),
        label_ids=labels,
        columns={},
        targets=targets,
        hidden={},
    )
