"""Examples on disk while they wait for the teacher: written once, then memory-mapped.

    examples -- Spool.write --> examples.arrow (a scratch file) -- [i] --> Example

A data set is counted, checked and digested before the teacher is asked anything, and may be larger
than memory.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.examples import Column, Example
from pipeline.identity import ExamplesDigest

ColumnType = Literal["string", "int64", "float64", "bool", "strings"]

_ROWS = 64
_ARRAYS = ("input_ids", "segment_lengths", "target_positions", "label_ids")
_TEXTS = ("example_id", "columns")
_SCHEMA = pa.schema(
    [pa.field(name, pa.large_string()) for name in _TEXTS]
    + [pa.field(name, pa.large_list(pa.int32())) for name in _ARRAYS]
)
_KINDS: dict[type, ColumnType] = {
    bool: "bool",
    int: "int64",
    float: "float64",
    str: "string",
    list: "strings",
}


class Spool:
    """Examples by number, read from a scratch file; every example has every column.

    Attributes:
        path: the scratch file.
        digest: of all examples in order.
        lengths: tokens of each example.
        targets: of all examples.
        longest: id and tokens of the longest example.
        longest_document: id and tokens of the example with the longest document.
        max_token: the largest token id.
        packed: whether any example holds several documents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kinds: dict[str, ColumnType | None] = {}
        self.lengths = array("q")
        self.targets = 0
        self.longest = self.longest_document = ("", 0)
        self.max_token = 0
        self.packed = False
        self._digest = ExamplesDigest()
        self._reader: Any = None

    @classmethod
    def write(cls, path: Path, examples: Iterable[Example]) -> "Spool":
        """Write all examples and open them for reading.

        Raises:
            DataError: there are none, or a column holds values of different types.
        """
        spool = cls(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            spool._write(iter(examples))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        spool._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return spool

    @property
    def columns(self) -> dict[str, ColumnType]:
        """The columns found, with their types."""
        return {name: kind or "string" for name, kind in self._kinds.items()}

    @property
    def digest(self) -> str:
        """Digest of all examples in order."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        batch = self._reader.get_batch(index // _ROWS)
        row = index % _ROWS
        arrays = {name: _row(batch.column(name), row) for name in _ARRAYS}
        found: dict[str, Column] = json.loads(batch.column("columns")[row].as_py())
        return Example(
            example_id=batch.column("example_id")[row].as_py(),
            columns={name: found.get(name) for name in self._kinds},
            **arrays,
        )

    def close(self) -> None:
        """Remove the scratch file."""
        self._reader = None
        self.path.unlink(missing_ok=True)

    def _write(self, examples: Iterator[Example]) -> None:
        with pa.OSFile(str(self.path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            while chunk := list(islice(examples, _ROWS)):
                for example in chunk:
                    self._count(example)
                writer.write_batch(_encode(chunk))
        if not self.lengths:
            raise DataError("the data hold no examples; check data.splits, where and max_examples")

    def _count(self, example: Example) -> None:
        self._digest.add(example)
        self.lengths.append(len(example.input_ids))
        self.targets += len(example.target_positions)
        if len(example.input_ids) > self.longest[1]:
            self.longest = (example.example_id, len(example.input_ids))
        document = int(example.segment_lengths.max(initial=0))
        if document > self.longest_document[1]:
            self.longest_document = (example.example_id, document)
        self.max_token = max(self.max_token, int(example.input_ids.max(initial=0)))
        self.packed = self.packed or len(example.segment_lengths) > 1
        for name, value in example.columns.items():
            self._note_column(name, value, example)

    def _note_column(self, name: str, value: Column, example: Example) -> None:
        known = self._kinds.setdefault(name, None)
        if value is None:
            return
        kind = _KINDS.get(type(value))
        if isinstance(value, list) and not all(isinstance(text, str) for text in value):
            kind = None
        if kind is None or (known is not None and kind != known):
            raise DataError(
                f"example {example.example_id!r}: column {name!r} holds {value!r}, expected"
                f" {known or 'text, texts, a number or a truth value'} as in other examples;"
                " carry columns of one plain type"
            )
        self._kinds[name] = kind


def _encode(examples: Sequence[Example]) -> Any:
    columns = [
        pa.array([e.example_id for e in examples], pa.large_string()),
        pa.array([json.dumps(dict(e.columns)) for e in examples], pa.large_string()),
    ]
    for name in _ARRAYS:
        parts = [getattr(example, name) for example in examples]
        offsets = np.cumsum([0] + [len(part) for part in parts])
        values = pa.array(np.concatenate(parts).astype(np.int32))
        columns.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values))
    return pa.record_batch(columns, schema=_SCHEMA)


def _row(column: Any, row: int) -> np.ndarray:
    offsets = column.offsets
    start, stop = offsets[row].as_py(), offsets[row + 1].as_py()
    values: np.ndarray = column.values[start:stop].to_numpy().copy()  # the mapping is read-only
    return values
