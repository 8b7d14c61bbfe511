"""A teacher's own texts as targets, kept as they come, so that an interruption loses little.

    rows -- windows -- batches --> Writer.write -> generated.jsonl -- generated_rows --> rows

What is drawn depends on the seed and on where a row stands, so a stage that goes on writes what it
would have written. The file is deleted once the cache stands, which holds the texts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

from pipeline.capture import batch_seed
from pipeline.errors import DataError
from pipeline.storage import sync_file, write_bytes
from pipeline.tasks.generation import Writer

_WINDOW = 256  # rows that are sorted by length and written to the file together


def write_texts(
    rows: Iterable[Mapping[str, Any]],
    task: Writer,
    model: Any,
    tokenizer: Any,
    file: Path,
    key: str,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Let the model write for every row of the splits for which the task says so, and go on where
    it stopped.

    Args:
        rows: with id and split.
        model: in evaluation mode.
        file: one line of JSON for each row, after the key.
        key: of all that decides what is written; a file with another one is begun anew.
        seed: of what is drawn.
        progress: told how many rows are done.

    Raises:
        DataError: no row is in a split that `generation.splits` names.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = _keep_whole_windows(file, key)
    wanted = (row for row in rows if task.writes(row["split"]) is not None)
    total, columns = 0, set[str]()
    for number, window in enumerate(_windows(wanted)):
        total += len(window)
        columns.update(_column(row, task) for row in window)
        if total > done:
            texts = _write_window(window, number, task, model, tokenizer, seed)
            lines = [
                json.dumps({"id": str(row["id"]), "texts": found}, ensure_ascii=False) + "\n"
                for row, found in zip(window, texts, strict=True)
            ]
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(lines))
            sync_file(file)
        progress(total)
    if task.targets == "generated" and "generated" not in columns:
        splits = ", ".join(task.generation.splits)
        raise DataError(f"task.generation.splits: no row is in {splits}; see data.splits")


def generated_rows(
    rows: Iterable[Mapping[str, Any]], task: Writer, file: Path
) -> Iterator[Mapping[str, Any]]:
    """The rows with the column that was written; one for each text, `id#0`, `id#1`, ... of several.

    Rows of other splits are given as they are.
    """
    with file.open(encoding="utf-8") as stream:
        next(stream)
        for row in rows:
            asked = task.writes(row["split"])
            if asked is None:
                yield row
                continue
            column, decoding = asked
            written = json.loads(next(stream))
            assert written["id"] == str(row["id"])  # the key holds the digest of the rows
            for number, text in enumerate(written["texts"]):
                name = f"{row['id']}#{number}" if decoding.count > 1 else row["id"]
                yield {**row, "id": name, column: text}


def _column(row: Mapping[str, Any], task: Writer) -> str:
    asked = task.writes(row["split"])
    assert asked is not None
    return asked[0]


def _keep_whole_windows(file: Path, key: str) -> int:
    """Cut the file behind its last whole window; how many rows it holds then."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    if not lines or json.loads(lines[0]) != {"key": key}:
        lines = [json.dumps({"key": key})]
    rows = lines[1:]
    kept = rows[: len(rows) // _WINDOW * _WINDOW]
    write_bytes(file, ("\n".join([lines[0], *kept]) + "\n").encode())  # never less than it was
    return len(kept)


def _windows(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while window := list(islice(iterator, _WINDOW)):
        yield window


def _write_window(
    window: Sequence[Mapping[str, Any]],
    number: int,
    task: Writer,
    model: Any,
    tokenizer: Any,
    seed: int,
) -> list[list[str]]:
    """The texts of a window's rows in their order, asked in batches of one split and similar
    length."""
    prompts, sources = task.prompts(window, tokenizer)
    lengths = [len(ids) for ids in (prompts if sources is None else sources)]
    order = sorted(range(len(window)), key=lambda row: (window[row]["split"], -lengths[row]))
    texts: list[list[str]] = [[] for _ in window]
    seeds = (batch_seed(seed, number, batch) for batch in count())
    for split, group in groupby(order, lambda row: window[row]["split"]):
        asked = task.writes(split)
        assert asked is not None
        while picked := list(islice(group, task.generation.batch_size)):
            rows = [window[row] for row in picked]
            found = task.write(model, tokenizer, rows, asked[1], next(seeds))
            for row, several in zip(picked, found, strict=True):
                texts[row] = several
    return texts
