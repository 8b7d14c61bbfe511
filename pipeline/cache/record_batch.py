"""A record batch of rows.arrow, decompressed as a whole and given out in views, still in codes.

RecordBatch -> Batch: columns of all its targets -- example(i) --> StoredExample, coded
    Collator: those of a training batch joined, then decoded    .targets: decoded alone
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from pipeline.cache.bounds import (
    require_features,
    require_fitting,
    require_no_nulls,
    require_numbers,
    require_values,
)
from pipeline.cache.codecs import Ranking
from pipeline.cache.coded import LABEL, CodedTargets, JoinedTargets, Rows
from pipeline.cache.manifest import Draft
from pipeline.cache.rows import FEATURES, TARGETS, TOKENS
from pipeline.examples import CachedExample, Column
from pipeline.targets import UNLABELLED, Targets


class StoredExample(CachedExample):
    """An example of a cache: its id, columns and targets are read when they are first asked for.

    Pickled, as for another process, it is whole: all is read now, and none of its cache goes along.

    Attributes:
        coded: its targets as the file has them, views of a record batch.
    """

    coded: CodedTargets
    _batch: "Batch"
    _row: int

    @cached_property
    def example_id(self) -> str:
        """See `Example`."""
        return self._batch.example_id(self._row)

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """See `Example`."""
        return self._batch.columns(self._row)

    @cached_property
    def targets(self) -> Targets:
        """See `CachedExample`."""
        return self.coded.to("cpu")

    def __reduce__(self) -> tuple[Any, ...]:
        values = {one.name: getattr(self, one.name) for one in fields(CachedExample)}
        return partial(CachedExample, **{**values, "hidden": dict(self.hidden)}), ()


def join_targets(examples: Sequence[CachedExample], late: bool = False) -> Targets | JoinedTargets:
    """The targets of examples of one cache end to end, in memory of their own.

    Args:
        late: leave them in codes where all examples are stored ones.
    """
    coded = [example.coded for example in examples if isinstance(example, StoredExample)]
    if len(coded) < len(examples):
        return Targets.cat([example.targets for example in examples])
    joined = CodedTargets.cat(coded)
    return joined.join() if late else joined.to("cpu")


class Batch:
    """A record batch; every example is a view of it and is not to be written to.

    Attributes:
        nbytes: what it occupies.
        visits: how often examples of it were given out.
    """

    def __init__(
        self,
        batch: Any,
        draft: Draft,
        kinds: Mapping[str, tuple[str, int]],
        ranking: Ranking,
        where: str = "",
    ) -> None:
        """Find the columns.

        Args:
            kinds: `target_columns(draft)`, which costs more than it should for every batch.
            ranking: the shard's.
            where: it is from, for messages.

        Raises:
            ValueError: columns that do not fit one another.
        """
        self._draft = draft
        self._ranking = ranking
        self._where = where
        self._padded = draft.imported is not None  # a dump's rows may hold fewer than K
        self._like = draft.targets.codec, draft.layout
        self._batch = batch
        self._rows = int(batch.num_rows)
        self.visits = 0
        names = batch.schema.names
        require_no_nulls([batch.column(name) for name in names if name not in draft.columns])
        lists = [_split_list(batch.column(name)) for name in (*TOKENS, TARGETS)]
        ends = [ends for ends, _ in lists]
        self._ends = [one.tolist() for one in ends]
        # Copies, because nobody may write to Arrow's memory, which torch has no way of knowing.
        self._tokens, self._segments = (
            require_values(buffers[1], "int32", int(ends[-1])).copy() for ends, buffers in lists[:2]
        )
        self._fields = _split_struct(lists[2][1], int(ends[2][-1]), kinds)
        self._positions = self._fields.pop("position")[:, 0].copy()
        self._labels = self._fields[LABEL][:, 0].copy()
        labels = len(draft.label_names or ())
        require_fitting(ends[0], self._segments, ends[1], ends[2], self._positions, labels)
        require_numbers(self._tokens, self._labels, draft.num_classes)
        if FEATURES[0] in names:
            starts, counts = (batch.column(name).to_numpy() for name in FEATURES)
            require_features(starts, counts, np.diff(ends[0]), np.diff(ends[2]))
        self._shifted = self._find_shifted() if draft.shifted else frozenset()
        sizes = (field.nbytes for field in self._fields.values())
        self.nbytes = sum(sizes) + 2 * self._tokens.nbytes + 2 * self._labels.nbytes

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def _scalars(self) -> dict[str, list[Any]]:
        names = (name for name in self._batch.schema.names if name not in (*TOKENS, TARGETS))
        return {name: self._batch.column(name).to_pylist() for name in names}

    def example_id(self, row: int) -> str:
        """The id of an example."""
        return str(self._scalars["example_id"][row])

    def columns(self, row: int) -> dict[str, Column]:
        """What is carried with an example."""
        return {name: self._scalars[name][row] for name in self._draft.columns}

    def features(self, row: int) -> slice:
        """Rows of the shard's feature signals that belong to an example, none without signals."""
        if FEATURES[0] not in self._scalars:
            return slice(0, 0)
        start, count = (self._scalars[name][row] for name in FEATURES)
        return slice(start, start + count)

    def is_spent(self) -> bool:
        """Whether as many examples were given out as it has: an epoch needs it no more."""
        return self.visits >= self._rows

    def is_shifted(self, row: int) -> bool:
        """Whether some label of an example is not the token after its position."""
        return row in self._shifted

    def example(self, row: int, hidden: Mapping[str, torch.Tensor]) -> CachedExample:
        """One example with its hidden states."""
        self.visits += 1
        tokens, segments, targets = (slice(ends[row], ends[row + 1]) for ends in self._ends)
        owner = partial(self._name, row)
        rows = Rows(self._fields, targets.start, targets.stop, self._ranking, self._padded, owner)
        example = StoredExample.__new__(StoredExample)
        vars(example).update(
            input_ids=self._tokens[tokens],
            segment_lengths=self._segments[segments],
            target_positions=self._positions[targets],
            label_ids=self._labels[targets],
            coded=CodedTargets((rows,), *self._like),
            hidden=hidden,
            _batch=self,
            _row=row,
        )
        return example

    def _name(self, row: int) -> str:
        return f"{self._where}: example {self.example_id(row)!r}"

    def _find_shifted(self) -> frozenset[int]:
        """Examples with any label that is not the token after its position."""
        starts, ends = np.array(self._ends[0]), np.array(self._ends[2])
        counts = ends[1:] - ends[:-1]
        after = self._positions + np.repeat(starts[:-1] + 1, counts)
        wrong = self._tokens.take(after, mode="clip") != self._labels
        wrong |= after >= np.repeat(starts[1:], counts)
        wrong &= self._labels != UNLABELLED
        if not wrong.any():
            return frozenset()
        return frozenset(np.repeat(np.arange(self._rows), counts)[wrong].tolist())


def _split_list(column: Any) -> tuple[np.ndarray, list[Any]]:
    """Offsets of a list column, and the buffers of what it lists; it begins where they do."""
    _, offsets, *buffers = column.buffers()
    return require_values(offsets, "int64", len(column) + 1), buffers


def _split_struct(
    buffers: Sequence[Any], count: int, kinds: Mapping[str, tuple[str, int]]
) -> dict[str, np.ndarray]:
    """Fields of N structs, [N, W] each, in Arrow's own memory.

    No nulls and no offsets: each list of fixed size and each number has an empty buffer before its
    values, as has the struct itself.
    """
    fields: dict[str, np.ndarray] = {}
    at = 0
    for name, (dtype, width) in kinds.items():
        at += 3 if width > 1 else 2
        fields[name] = require_values(buffers[at], dtype, count * width).reshape(count, width)
    return fields
