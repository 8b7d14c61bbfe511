"""Cached examples to Arrow record batches and back, version 1 of the format.

    [CachedExample, ...] -- encode_batch --> RecordBatch -- Batch.example(i) --> CachedExample

One row is one example. What belongs to its N targets lies in flat lists of N times as many values
as the column has per target. Lists have 64-bit offsets: with every class of a large class space
kept, one example alone can pass 2^31 values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.codecs import Entries
from pipeline.cache.manifest import ColumnType, Draft
from pipeline.errors import DataError, NumericalError
from pipeline.examples import CachedExample, Column
from pipeline.targets import UNLABELLED, Targets

_TYPES: dict[ColumnType, Any] = {
    "string": pa.large_string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
_INTEGERS = ("input_ids", "segment_lengths", "target_positions", "label_ids")
_FINITE = ("logits", "draw_logits", "logsumexp", "label_log_probs")


def make_schema(draft: Draft) -> Any:
    """The Arrow schema of rows.arrow; data/README.md describes it column by column.

    Raises:
        DataError: a carried column has the name of one of the format.
    """
    kinds = draft.targets.codec.columns(draft.layout)
    own = [pa.field("example_id", pa.large_string(), nullable=False)]
    own += [_list_field(name, "int32") for name in _INTEGERS]
    own += [_list_field(name, dtype) for name, (dtype, _) in kinds.items()]
    own += [pa.field("feature_start", pa.int64(), nullable=False)]
    own += [pa.field("feature_count", pa.int64(), nullable=False)]
    taken = {field.name for field in own}.intersection(draft.columns)
    if taken:
        raise DataError(
            f"column {min(taken)!r}: the cache has a column of that name itself; carry it under"
            " another name"
        )
    return pa.schema(own + [pa.field(name, _TYPES[kind]) for name, kind in draft.columns.items()])


def count_features(example: CachedExample, draft: Draft) -> int:
    """M, the rows of its signals per feature; 0 where there are none."""
    names = [name for name, signal in draft.signals.items() if signal.per == "feature"]
    return len(example.hidden[names[0]]) if names else 0


def check_example(example: CachedExample, draft: Draft) -> None:
    """Refuse an example that does not fit the draft or itself.

    Raises:
        DataError: a count, shape, id or column that does not fit.
        NumericalError: NaN or infinity.
    """
    subject = f"example {example.example_id!r}"
    for what, found, expected in _facts(example, draft):
        if found != expected:
            raise DataError(f"{subject}: {what} is {found}, expected {expected}; mend the capture")
    targets = example.targets
    for name in _FINITE:
        if not torch.isfinite(getattr(targets, name)).all():
            raise NumericalError(
                f"{subject}: the teacher's {name} hold NaN or infinity;"
                " try another dtype for the teacher"
            )
    for name, ids in (("ids", targets.ids), ("draw_ids", targets.draw_ids)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < draft.num_classes:
            raise DataError(f"{subject}: {name} outside [0, {draft.num_classes}); mend the capture")
    if not np.array_equal(targets.label_ids.numpy(), example.label_ids):
        raise DataError(f"{subject}: its targets have other label_ids than it has; mend the task")
    if draft.shifted and (found := find_shift(example)):
        raise DataError(f"{subject}: {found}; row t must be about token t + 1, mend the task")
    _check_hidden(example, draft, subject)


def find_shift(example: CachedExample) -> str | None:
    """Compare each label with the token after its position; say where they differ first."""
    labelled = np.flatnonzero(example.label_ids != UNLABELLED)
    after = example.target_positions[labelled] + 1
    if not len(after):
        return None
    if after.max() >= len(example.input_ids):
        return f"a target about position {int(after.max())} of {len(example.input_ids)} tokens"
    wrong = np.flatnonzero(example.input_ids[after] != example.label_ids[labelled])
    if not len(wrong):
        return None
    at, label = int(after[wrong[0]]), int(example.label_ids[labelled[wrong[0]]])
    return f"token {int(example.input_ids[at])} at position {at}, but its target is about {label}"


def encode_batch(examples: Sequence[CachedExample], draft: Draft, feature_start: int) -> Any:
    """Encode checked examples as one RecordBatch.

    Args:
        feature_start: row of the shard's feature signals with which the first example begins.

    Raises:
        DataError: a kept id twice in one target, or a carried value of another type.
    """
    targets = Targets.cat([example.targets for example in examples])
    counts = np.array([len(example.targets) for example in examples], dtype=np.int64)
    entries = Entries(*(getattr(targets, f.name).numpy() for f in fields(Entries)))
    _require_distinct(entries.ids, counts, examples)
    layout, codec = draft.layout, draft.targets.codec
    kinds = codec.columns(layout)
    columns: dict[str, Any] = {}
    for name in _INTEGERS:
        parts = [np.asarray(getattr(example, name), dtype=np.int32) for example in examples]
        columns[name] = _list_array(np.concatenate(parts), np.array([len(p) for p in parts]))
    for name, values in codec.encode(entries, layout).items():
        columns[name] = _list_array(values, counts * kinds[name][1])
    features = np.array([count_features(example, draft) for example in examples], dtype=np.int64)
    columns["feature_start"] = pa.array(feature_start + np.cumsum(features) - features)
    columns["feature_count"] = pa.array(features)
    columns["example_id"] = pa.array([e.example_id for e in examples], pa.large_string())
    for name, kind in draft.columns.items():
        columns[name] = _carried_array(name, kind, examples)
    schema = make_schema(draft)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


class Batch:
    """A decompressed record batch; each example is decoded when it is asked for."""

    def __init__(self, batch: Any, draft: Draft) -> None:
        self._batch = batch
        self._draft = draft
        self.nbytes: int = batch.get_total_buffer_size()

    @cached_property
    def _lists(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for field in self._batch.schema:
            if pa.types.is_large_list(field.type):
                column = self._batch.column(field.name)
                lists[field.name] = column.offsets.to_numpy(), column.values.to_numpy()
        return lists

    @cached_property
    def _scalars(self) -> dict[str, list[Any]]:
        return {
            field.name: self._batch.column(field.name).to_pylist()
            for field in self._batch.schema
            if not pa.types.is_large_list(field.type)
        }

    def example_id(self, row: int) -> str:
        """The id of an example."""
        return str(self._scalars["example_id"][row])

    def features(self, row: int) -> slice:
        """Rows of the shard's feature signals that belong to an example."""
        start = self._scalars["feature_start"][row]
        return slice(start, start + self._scalars["feature_count"][row])

    def example(self, row: int, hidden: Mapping[str, torch.Tensor]) -> CachedExample:
        """Decode one example and give it its hidden states."""
        integers = {name: self._values(name, row).copy() for name in _INTEGERS}
        columns: dict[str, Column] = {
            name: self._scalars[name][row] for name in self._draft.columns
        }
        return CachedExample(
            example_id=self.example_id(row),
            **integers,
            columns=columns,
            targets=self._targets(row, integers["label_ids"]),
            hidden=hidden,
        )

    def _values(self, name: str, row: int) -> np.ndarray:
        offsets, values = self._lists[name]
        return values[offsets[row] : offsets[row + 1]]

    def _targets(self, row: int, label_ids: np.ndarray) -> Targets:
        draft = self._draft
        kinds = draft.targets.codec.columns(draft.layout)
        rows = len(label_ids)
        encoded = {
            name: self._values(name, row).reshape(rows, width) for name, (_, width) in kinds.items()
        }
        entries = draft.targets.codec.decode(encoded, draft.layout)
        return Targets(
            ids=torch.from_numpy(entries.ids),
            logits=torch.from_numpy(entries.logits),
            draw_ids=torch.from_numpy(entries.draw_ids),
            draw_logits=torch.from_numpy(entries.draw_logits),
            logsumexp=torch.from_numpy(entries.logsumexp),
            label_ids=torch.from_numpy(label_ids.astype(np.int64)),
            label_log_probs=torch.from_numpy(entries.label_log_probs),
            temperatures=draft.targets.temperatures,
            num_classes=draft.num_classes,
        )


def _facts(example: CachedExample, draft: Draft) -> list[tuple[str, Any, Any]]:
    targets, spec, layout = example.targets, draft.targets, draft.layout
    count, tokens = len(example.target_positions), len(example.input_ids)

    def shape(name: str) -> tuple[str, list[int], list[int]]:
        return f"the shape of targets.{name}", list(getattr(targets, name).shape), expected[name]

    expected = {
        "ids": [count, layout.top_k],
        "logits": [count, layout.top_k],
        "draw_ids": [count, layout.tail_draws],
        "draw_logits": [count, layout.tail_draws],
        "logsumexp": [count, len(spec.temperatures)],
        "label_log_probs": [count],
        "label_ids": [count],
    }
    return [
        ("the sum of segment_lengths", int(np.sum(example.segment_lengths)), tokens),
        ("the number of label_ids", len(example.label_ids), count),
        *map(shape, expected),
        ("targets.temperatures", targets.temperatures, spec.temperatures),
        ("targets.num_classes", targets.num_classes, draft.num_classes),
        ("the list of columns", sorted(example.columns), sorted(draft.columns)),
        ("the list of hidden signals", sorted(example.hidden), sorted(draft.signals)),
    ]


def _check_hidden(example: CachedExample, draft: Draft, subject: str) -> None:
    features = count_features(example, draft)
    allowed = {len(example.target_positions), len(example.input_ids)}
    for name, signal in draft.signals.items():
        found = list(example.hidden[name].shape)
        rows = 1 if signal.per == "example" else features
        if found != [rows, signal.width] or (signal.per == "feature" and rows not in allowed):
            counts = "1" if signal.per == "example" else " or ".join(map(str, sorted(allowed)))
            raise DataError(
                f"{subject}: hidden {name} has shape {found}, expected [{counts}, {signal.width}]"
                " as every signal; mend the capture"
            )
        limit = float(np.finfo(signal.dtype).max)
        values = example.hidden[name]
        if values.numel() and not bool((values.abs() <= limit).all()):
            raise NumericalError(
                f"{subject}: hidden {name} holds NaN or numbers above the {limit:g} of"
                f" {signal.dtype}; try dtype float32"
            )


def _require_distinct(
    ids: np.ndarray, counts: np.ndarray, examples: Sequence[CachedExample]
) -> None:
    ordered = np.sort(ids, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(twice):
        owner = int(np.searchsorted(np.cumsum(counts), twice[0], side="right"))
        raise DataError(
            f"example {examples[owner].example_id!r}: a class is kept twice in one target;"
            " mend the capture"
        )


def _list_field(name: str, dtype: str) -> Any:
    item = pa.field("item", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
    return pa.field(name, pa.large_list(item), nullable=False)


def _list_array(values: np.ndarray, counts: np.ndarray) -> Any:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    flat = pa.array(np.ascontiguousarray(values).ravel())
    item = pa.field("item", flat.type, nullable=False)
    return pa.LargeListArray.from_arrays(pa.array(offsets), flat, type=pa.large_list(item))


def _carried_array(name: str, kind: ColumnType, examples: Sequence[CachedExample]) -> Any:
    values = [example.columns[name] for example in examples]
    try:
        return pa.array(values, _TYPES[kind])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"column {name!r}: holds a value that is no {kind} ({error})") from error
