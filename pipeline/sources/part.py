"""One split of a data set, read as rows with canonical columns.

table -> which source column is which -> the rows that are kept -> dict after dict
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from pipeline.errors import DataError, did_you_mean
from pipeline.sources.config import DataConfig, Split, Values
from pipeline.sources.labels import Key, read_label
from pipeline.sources.opening import Opened, Table

CANONICAL = (
    "id",
    "text",
    "text_pair",
    "score",
    "label",
    "messages",
    "prompt",
    "completion",
    "tokens",
    "tags",
    "question",
    "context",
    "answers",
)
_PAIR = ("source", "target")  # canonical together: a `source` alone may be where a text is from
_BATCH = 1024  # rows that are Python objects at one time


@dataclass(frozen=True)
class Part:
    """The kept rows of one split.

    Attributes:
        split: train, validation or test.
        table: the kept rows, Arrow-backed, with the source's columns.
        numbers: [n] int64, each row's number in the source's split, for ids where there are none.
        columns: canonical column -> source column.
        shown: the canonical columns of a row, beside id and split.
        subject: names the source and split in errors.
    """

    split: Split
    table: Table
    numbers: np.ndarray
    columns: Mapping[str, str]
    shown: tuple[str, ...]
    subject: str

    def __len__(self) -> int:
        return len(self.table)

    @property
    def class_column(self) -> str | None:
        """The column that holds classes: `tags` where rows have tokens, else `label`, or none."""
        if {"tokens", "tags"} <= self.columns.keys():
            return "tags"
        return "label" if "label" in self.columns else None

    @property
    def class_feature(self) -> Any:
        """The type of one class in that column."""
        feature = self.table.features[self.columns[self.class_column or ""]]
        return getattr(feature, "feature", feature)  # of a list, that of its entries

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows with id, split and the shown columns; classes as the source has them."""
        wanted = [self.columns[c] for c in (*self.shown, "id") if c in self.columns]
        at = 0
        for batch in _batches(self.table, wanted):
            cells = {c: self._cells(batch, c) for c in self.shown}
            for offset, row_id in enumerate(self._batch_ids(batch, at)):
                row = {c: column[offset] for c, column in cells.items()}
                yield {"id": row_id, "split": self.split, **row}
                at += 1

    def ids(self) -> Iterator[str]:
        """The ids alone, in order."""
        if "id" not in self.columns:
            yield from self._batch_ids({}, 0)
            return
        at = 0
        for batch in _batches(self.table, [self.columns["id"]]):
            ids = self._batch_ids(batch, at)
            yield from ids
            at += len(ids)

    def labels(self) -> Iterator[list[Key | None]]:
        """The classes of each row, one or, in a list, many; None where one is missing.

        Raises:
            DataError: the column cannot hold class labels.
        """
        column = self.class_column or ""
        source = self.columns[column]
        try:
            for batch in _batches(self.table, [source]):
                for cell in self._classes(batch[source]):
                    yield cell if isinstance(cell, list) else [cell]
        except DataError as error:
            raise DataError(f"{self.subject}: column {source!r} ({column}) {error}") from error

    def matching(self, where: Mapping[str, Values]) -> np.ndarray:
        """[n] bool, the rows whose columns hold one of the listed values."""
        kept = np.ones(len(self), dtype=bool)
        for column, values in where.items():
            source = self.columns[column]
            name = _namer(self.table.features[source])
            cells = (cell for b in _batches(self.table, [source]) for cell in b[source])
            hits = (name(cell) in values for cell in cells)
            kept &= np.fromiter(hits, dtype=bool, count=len(self))
        return kept

    def has_labels(self) -> np.ndarray:
        """[n] bool, the rows with any class, or with an answer to their question."""
        found: Iterable[bool]
        if self.class_column is None:
            source = self.columns["answers"]
            cells = (cell for batch in _batches(self.table, [source]) for cell in batch[source])
            found = (bool(cell and (isinstance(cell, list) or cell["text"])) for cell in cells)
        else:
            found = (any(key is not None for key in keys) for keys in self.labels())
        return np.fromiter(found, dtype=bool, count=len(self))

    def _batch_ids(self, batch: Mapping[str, list[Any]], start: int) -> list[str]:
        if "id" not in self.columns:
            size = len(next(iter(batch.values()))) if batch else len(self)
            return [f"{self.split}-{number}" for number in self.numbers[start : start + size]]
        cells = batch[self.columns["id"]]
        for offset, cell in enumerate(cells):
            if cell is None or isinstance(cell, list | dict):
                number = self.numbers[start + offset]
                raise DataError(
                    f"{self.subject}: row {number} has {cell!r} as its id; mend it, or leave"
                    " columns.id out to number the rows"
                )
        return [str(cell) for cell in cells]

    def _cells(self, batch: Mapping[str, list[Any]], column: str) -> list[Any]:
        source = self.columns[column]
        if column == self.class_column:
            return self._classes(batch[source])
        return list(map(_namer(self.table.features[source]), batch[source]))

    def _classes(self, cells: Iterable[Any]) -> list[Any]:
        """Class keys: one for each cell, a list for each cell that is one."""
        read = read_label(self.class_feature)
        return [[*map(read, cell)] if isinstance(cell, list) else read(cell) for cell in cells]


def cut_part(split: Split, opened: Opened, config: DataConfig, columns: Mapping[str, str]) -> Part:
    """The rows of a split that `where` and `max_examples` keep.

    Raises:
        DataError: none are left, or a carried column holds no plain value.
    """
    table = opened.tables[split]
    subject = f"{config.source} ({split})"
    if len(table) == 0:
        raise DataError(f"{subject}: is empty; expected at least one row")
    inherent = {*CANONICAL, *_PAIR, *opened.columns, *config.columns, *config.carry}
    shown = tuple(c for c in columns if c in inherent and c != "id")  # not those of filters alone
    whole = Part(split, table, np.arange(len(table)), columns, shown, subject)
    for column in config.carry:
        _check_plain(whole, column)
    kept = np.flatnonzero(whole.matching(config.where))[: config.max_of(split)]
    if len(kept) == 0:
        raise DataError(f"{subject}: `where` keeps none of its {len(table)} rows; mend `where`")
    cut = table if len(kept) == len(table) else table.select(kept)
    return Part(split, cut, kept, columns, shown, subject)


def resolve_columns(config: DataConfig, opened: Opened) -> dict[str, str]:
    """Canonical column -> source column, of all that is there and wanted.

    Raises:
        DataError: a column that the config names is not there (with the nearest one).
    """
    there = list(next(iter(opened.tables.values())).column_names)
    inherent = [*CANONICAL, *(_PAIR if all(column in there for column in _PAIR) else ())]
    # A column of labels that is mapped to another name, a score for instance, holds no classes.
    taken = {"label"} & set(config.columns.values())
    own = {c: c for c in inherent if c in there and c not in taken}
    known = own | dict(opened.columns) | config.columns
    labelled = config.labelled.where if config.labelled else {}
    asked = [c for c in (*config.carry, *config.where, *labelled) if c not in ("id", "split")]
    columns = known | {c: c for c in asked if c not in known}
    missing = [c for c in columns if columns[c] not in there]
    if missing:
        column = missing[0]
        names = ", ".join(repr(columns[c]) for c in missing)
        raise DataError(
            f"{config.source}: has no column {names}{did_you_mean(columns[column], there)}; map it"
            f" with columns.{column}"
        )
    return columns


def _batches(table: Table, columns: Iterable[str]) -> Iterator[Mapping[str, list[Any]]]:
    chosen = table.select_columns(list(dict.fromkeys(columns)))
    yield from chosen.iter(batch_size=_BATCH)


def _namer(feature: Any) -> Any:
    """Cells as they are, but classes by their name."""
    if isinstance(feature, datasets.ClassLabel):
        return lambda cell: None if cell is None or cell < 0 else feature.int2str(cell)
    return lambda cell: cell


def _check_plain(part: Part, column: str) -> None:
    if column in ("id", "split"):
        return
    feature = part.table.features[part.columns[column]]
    if isinstance(feature, datasets.ClassLabel):
        return
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Value) and inner.dtype.endswith("string"):
        return  # a list of texts
    dtype = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    if not dtype.endswith("string") and not dtype.startswith(("int", "uint", "float", "bool")):
        raise DataError(
            f"{part.subject}: column {column!r} holds {dtype}, expected text, a list of texts or"
            " numbers; leave it out of `carry`"
        )
