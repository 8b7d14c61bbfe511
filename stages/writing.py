"""Texts that the teacher writes itself, before it is asked about them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Console

from pipeline.generating import generated_rows, write_texts
from pipeline.identity import digest_json
from pipeline.sources import DataConfig, Rows
from pipeline.storage import scratch_folder
from pipeline.tasks import Task
from pipeline.tasks.generation import Writer
from stages.progress import RowProgress

_FILE = "generated.jsonl"  # until the cache holds the texts


def lets_write(task: Task, data: DataConfig) -> TypeGuard[Writer]:
    """Whether the teacher is to write: targets, or hypotheses for held-out sources."""
    return isinstance(task, Writer) and (
        task.targets == "generated" or any(map(task.writes, data.splits))
    )


def write_targets(
    cache: Path,
    task: Writer,
    rows: Rows,
    tokenizer: Any,
    model: Any,
    key: Mapping[str, Any],
    console: Console,
) -> Iterator[Mapping[str, Any]]:
    """The rows with the teacher's own texts, which wait in a file of the cache's folder.

    Args:
        key: what else decides them, beside task and rows: teacher, tokenizer and seed.
    """
    decided = {**key, "task": task.model_dump(mode="json"), "data": rows.digest}
    file, seed = scratch_folder(cache) / _FILE, int(key["seed"])
    with RowProgress(console, "generating", len(rows)) as bar:
        write_texts(rows, task, model, tokenizer, file, digest_json(decided), seed, bar.advance)
    return generated_rows(rows, task, file)
