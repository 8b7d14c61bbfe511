"""Export a finished student: run -> a folder to deploy -> what it lost, measured on what it saved.

The folder appears whole or not at all. Every form that changes a number is opened again as a user
opens it and measured on the run's held-out examples, beside the run itself, on the CPU.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pipeline.errors import ConfigError, StillroomError, did_you_mean
from pipeline.examples import Example
from pipeline.export import (
    GraphStudent,
    copy_tokenizer,
    copy_weights,
    load_int8,
    save_as,
    save_int8,
    save_onnx,
    weight_bytes,
)
from pipeline.metrics import Metric
from pipeline.student.key_values import without_cache
from stages.evaluate import FinishedRun, open_run
from stages.quiet import quiet_libraries

_COMPARED = 64  # held-out examples whose logits are compared
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        folder: where it lies.
        format: a name of FORMATS.
        bytes_before, bytes_after: of the weights, in the run and here.
        before, after: metrics of the run and of what was saved, in one order; empty where the
            weights are the same bytes.
        notes: what else there is to know, one sentence each.
    """

    folder: Path
    format: str
    bytes_before: int
    bytes_after: int
    before: list[Metric] = field(default_factory=list)
    after: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Saved:
    """What a format wrote: a model to measure (None where no number changed), and notes."""

    model: nn.Module | None
    notes: list[str]


@quiet_libraries()
def export(
    run: Path,
    format: str = "transformers",
    output: Path | None = None,
    dtype: str | None = None,
    split: str | None = None,
) -> Export:
    """Write a finished student in a form to deploy.

    Args:
        run: the run's folder.
        format: a name of FORMATS.
        output: the folder to write; <run>/exports/<format> where left out.
        dtype: of the weights of a transformers folder; the run's own where left out.
        split: train, validation or test, for the metrics; the one of its config where left out.

    Raises:
        StillroomError: no finished student, no such format or dtype, a folder that holds files
            already, or a model that has no such form.
    """
    _check(format, dtype)
    folder = output or run / "exports" / _folder_name(format, dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StillroomError(f"{folder}: holds files already; choose another --output or delete it")
    opened = open_run(run)
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        saved = FORMATS[format](opened, draft, dtype)
        copy_tokenizer(run, draft)
        before, after = [], []
        if saved.model is not None:
            before, after = (opened.measure(m, split) for m in (opened.load(), saved.model))
        sizes = weight_bytes(run), weight_bytes(draft)
        if folder.exists():
            folder.rmdir()
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Export(folder, format, *sizes, before, after, saved.notes)


def print_export(exported: Export, console: Console) -> None:
    """Where it lies, how large it is, and every metric before and after."""
    before, after = exported.bytes_before, exported.bytes_after
    console.print(
        f"{exported.folder}: {exported.format}, weights {_megabytes(after)} MB of"
        f" {_megabytes(before)} MB ({100 * after / max(before, 1):.0f} %)",
        soft_wrap=True,
    )
    for note in exported.notes:
        console.print(note, soft_wrap=True)
    if not exported.after:
        return
    table = Table("metric", "run", "export", "change", "unit", "slice")
    for old, new in zip(exported.before, exported.after, strict=True):
        change = f"{new.value - old.value:+.2g}"
        table.add_row(old.name, f"{old.value:.4g}", f"{new.value:.4g}", change, old.unit, old.slice)
    console.print(table)


def _check(format: str, dtype: str | None) -> None:
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r} is not known{did_you_mean(format, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known{did_you_mean(dtype, DTYPES)}")
    if dtype is not None and format != "transformers":
        raise ConfigError(f"--dtype {dtype}: is for --format transformers; leave it out")


def _folder_name(format: str, dtype: str | None) -> str:
    return format if dtype is None else f"{format}-{dtype}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"


def _export_transformers(run: FinishedRun, folder: Path, dtype: str | None) -> _Saved:
    if dtype is None:
        copy_weights(run.folder, folder)
        return _Saved(None, [])
    precision: torch.dtype = getattr(torch, dtype)
    save_as(run.load(), precision, folder)
    return _Saved(run.load(folder).to(precision), [])


def _export_int8(run: FinishedRun, folder: Path, dtype: str | None) -> _Saved:
    model = run.load()
    total = model.num_parameters()
    count = save_int8(model, run.reading.task.auto_class, folder)
    note = f"int8: {count:,} of {total:,} weights ({100 * count / total:.1f} %), the rest float32"
    return _Saved(load_int8(folder), [note])


def _export_onnx(run: FinishedRun, folder: Path, dtype: str | None) -> _Saved:
    model, examples = run.load(), _first_examples(run)
    widest = sorted(examples, key=lambda e: (len(e.segment_lengths), len(e.input_ids)))[-2:]
    inputs = run.reading.collator([])([*widest, *widest][:2])["inputs"]  # two rows at least
    save_onnx(model, inputs, folder)
    graph = GraphStudent(folder, model.config)
    difference, largest = _compare_logits(run, examples, model, graph)
    note = (
        f"onnx: takes {', '.join(inputs)}; over {len(examples)} held-out examples logits of up to"
        f" {largest:.3g} differ by at most {difference:.1e}"
    )
    return _Saved(graph, [note])


def _first_examples(run: FinishedRun) -> list[Example]:
    held_out = run.reading.select(run.config.evaluation.split)
    return [held_out[index] for index in range(min(len(held_out), _COMPARED))]


@torch.inference_mode()
def _compare_logits(
    run: FinishedRun, examples: list[Example], one: nn.Module, other: nn.Module
) -> tuple[float, float]:
    """The largest difference of two models' logits at the targets, and the largest logit."""
    collator, task, size = run.reading.collator([]), run.reading.task, 16
    difference = largest = 0.0
    for start in range(0, len(examples), size):
        batch = collator(examples[start : start + size])
        inputs, index = batch["inputs"], batch["target_index"]
        with without_cache(one):
            expected, found = (task.logits(m(**inputs), inputs)[index] for m in (one, other))
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference, largest


FORMATS: Mapping[str, Callable[[FinishedRun, Path, str | None], _Saved]] = {
    "transformers": _export_transformers,
    "int8": _export_int8,
    "onnx": _export_onnx,
}
