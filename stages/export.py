"""Export a finished student: run -> a folder to deploy -> what it lost, measured on what it saved.

The folder appears whole or not at all. Every form that changes a number is opened again as a user
opens it and measured on the run's held-out examples, beside the run itself, on the CPU.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import ConfigError, StillroomError, did_you_mean
from pipeline.export import check_repository, copy_tokenizer, list_upload, push, weight_bytes
from pipeline.metrics import Metric
from pipeline.report.card import CardExport, write_card
from pipeline.report.text import show_running
from pipeline.runs import read_result
from stages.disk import tells_of_disk
from stages.evaluate import open_run
from stages.forms import FORMATS
from stages.quiet import quiet_libraries

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


@quiet_libraries()
@tells_of_disk(
    lambda run, format="", output=None, *args, **kwargs: (output or run, "the run is untouched")
)
def export(
    run: Path,
    format: str = "transformers",
    output: Path | None = None,
    dtype: str | None = None,
    split: str | None = None,
    licence: str | None = None,
    repository: str | None = None,
) -> Export:
    """Write a finished student in a form to deploy.

    Args:
        run: the run's folder.
        format: a name of FORMATS.
        output: the folder to write; <run>/exports/<format> where left out.
        dtype: of the weights of a transformers folder; the run's own where left out.
        split: train, validation or test, for the metrics; the one of its config where left out.
        licence: of the student, for its card; unknown where left out.
        repository: what its card calls it, for instance me/small-student; the run's name where
            left out. Nothing is sent there; see `publish`.

    Raises:
        StillroomError: no finished student, no such format or dtype, a folder that holds files
            already, or a model that has no such form.
    """
    _check(format, dtype)
    if repository is not None:
        check_repository(repository)
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
        notes = CardExport(
            format, repository, licence, saved.inputs, split, before, after, saved.notes
        )
        write_card(draft, read_result(run), notes)
        sizes = weight_bytes(run), weight_bytes(draft)
        if folder.exists():
            folder.rmdir()
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Export(folder, format, *sizes, before, after, saved.notes)


def publish(folder: Path, repository: str, private: bool, dry_run: bool, console: Console) -> None:
    """List what goes to the hub, and send it there unless it is a dry run.

    Raises:
        StillroomError: it cannot be sent; the folder stays as it is.
    """
    table = Table(f"{repository}/", "bytes")
    for path, size in list_upload(folder).items():
        table.add_row(path, f"{size:,}")
    console.print(table)
    if dry_run:
        console.print("dry run: nothing was sent")
    else:
        console.print(f"sent: {push(folder, repository, private)}", soft_wrap=True)


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
        values = (f"{old.value:.4g}", f"{new.value:.4g}", change, old.unit)
        table.add_row(old.name, *values, Text(show_running(old.slice)))
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
