"""Cached examples to Arrow record batches, version 1 of the format; `record_batch` reads them.

    [CachedExample, ...], each checked -- encode_batch --> RecordBatch

One row is one example, and its targets are one list of structs: what a codec makes of N targets, a
column with [N, W] values, becomes a field of W values. Lists have 64-bit offsets: with every class
of a large class space kept, one example alone can pass 2^31 values.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.accepting import count_features
from pipeline.cache.codecs import Entries, Ranking
from pipeline.cache.columns import find_message
from pipeline.cache.manifest import ColumnType, Draft
from pipeline.errors import DataError, say
from pipeline.examples import CachedExample
from pipeline.targets import Targets

COLUMN_TYPES: dict[ColumnType, Any] = {
    "string": pa.large_string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "strings": pa.large_list(pa.field("item", pa.large_string(), nullable=False)),
}
TOKENS = ("input_ids", "segment_lengths")
TARGETS = "targets"
FEATURES = ("feature_start", "feature_count")


def target_columns(draft: Draft) -> dict[str, tuple[str, int]]:
    """Fields of a target: name -> (numpy dtype, values per target), the codec's last."""
    own = {"position": ("int32", 1), "label_id": ("int32", 1)}
    return own | draft.targets.codec.columns(draft.layout)


def make_schema(draft: Draft) -> Any:
    """The Arrow schema of rows.arrow; data/README.md describes it column by column.

    Raises:
        DataError: a carried column has the name of one of the format.
    """
    own = [pa.field("example_id", pa.large_string(), nullable=False)]
    own += [pa.field(name, _list_of(pa.int32()), nullable=False) for name in TOKENS]
    own += [pa.field(TARGETS, _list_of(_target_type(draft)), nullable=False)]
    if any(signal.per == "feature" for signal in draft.signals.values()):
        own += [pa.field(name, pa.int64(), nullable=False) for name in FEATURES]
    taken = {*FEATURES, *(field.name for field in own)}.intersection(draft.columns)
    if taken:
        raise DataError(
            f"column {min(taken)!r}: the cache has a column of that name itself; carry it under"
            " another name"
        )
    return pa.schema(
        own + [pa.field(name, COLUMN_TYPES[kind]) for name, kind in draft.columns.items()]
    )


def learn_ranking(examples: Sequence[CachedExample], draft: Draft) -> Ranking:
    """Number the classes of a shard by how often its first examples keep them.

    Without compression numbers are as large as ids, and would only have to be looked up.
    """
    if draft.targets.compression == "none":
        return Ranking(np.zeros(0, dtype=np.int32), draft.num_classes)
    ids = [ids.ravel() for e in examples for ids in (e.targets.ids, e.targets.draw_ids)]
    return Ranking.learn(torch.cat(ids).numpy(), draft.num_classes)


def encode_batch(
    examples: Sequence[CachedExample], draft: Draft, ranking: Ranking, feature_start: int
) -> Any:
    """Encode checked examples as one RecordBatch.

    Args:
        ranking: the shard's.
        feature_start: row of the shard's feature signals with which the first example begins.

    Raises:
        DataError: a kept id twice in one target, or a carried value of another type.
    """
    columns: dict[str, Any] = {}
    for name in TOKENS:
        parts = [np.asarray(getattr(example, name), dtype=np.int32) for example in examples]
        columns[name] = _list_array(np.concatenate(parts), [len(part) for part in parts])
    columns[TARGETS] = _target_array(examples, draft, ranking)
    features = np.array([count_features(example, draft) for example in examples], dtype=np.int64)
    columns["feature_start"] = pa.array(feature_start + np.cumsum(features) - features)
    columns["feature_count"] = pa.array(features)
    columns["example_id"] = pa.array([e.example_id for e in examples], pa.large_string())
    for name, kind in draft.columns.items():
        columns[name] = _carried_array(name, kind, examples)
    schema = make_schema(draft)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def decode_batch(content: Any, schema: Any) -> Any:
    """The record batch in some bytes of a file: what `encode_batch` gave.

    Args:
        content: a buffer with one record batch message; that of the first one begins with the file.

    Raises:
        pa.ArrowException: no such message, or one that does not fit the schema or itself.
        ValueError: one that claims more than it can hold.
    """
    _, message = find_message(content)
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)  # a broken offset must not reach memory
    return batch


def decode_columns(content: Any, schema: Any, names: Sequence[str]) -> Any:
    """Columns of the record batch in some bytes of a file; no other is decompressed.

    Returns:
        A RecordBatch of them, in the order of the schema.

    Raises:
        pa.ArrowException, ValueError: see `decode_batch`.
    """
    start, _ = find_message(content)
    fields = sorted(schema.get_field_index(name) for name in names)
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    stream = schema.serialize().to_pybytes() + content.slice(start).to_pybytes()
    batch = pa.ipc.open_stream(pa.BufferReader(stream), options=options).read_next_batch()
    batch.validate(full=True)
    return batch


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


def _list_of(kind: Any) -> Any:
    return pa.large_list(pa.field("item", kind, nullable=False))


def _target_type(draft: Draft) -> Any:
    """Struct of the fields of a target: a plain number, or a list of fixed size."""
    kinds = []
    for name, (dtype, width) in target_columns(draft).items():
        item = pa.field("item", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
        kind = item.type if width == 1 else pa.list_(item, width)
        kinds.append(pa.field(name, kind, nullable=False))
    return pa.struct(kinds)


def _target_array(examples: Sequence[CachedExample], draft: Draft, ranking: Ranking) -> Any:
    targets = Targets.cat([example.targets for example in examples])
    counts = [len(example.targets) for example in examples]
    parts = {f.name: getattr(targets, f.name).numpy() for f in fields(Entries)}
    for name in ("ids", "draw_ids"):
        parts[name] = parts[name].astype(np.int64, copy=False)
    entries = Entries(**parts)
    _require_distinct(entries.ids, np.array(counts), examples)
    positions = [np.asarray(e.target_positions, dtype=np.int32) for e in examples]
    values: dict[str, np.ndarray] = {
        "position": np.concatenate(positions),
        "label_id": targets.label_ids.numpy().astype(np.int32),
    }
    values |= draft.targets.codec.encode(entries, replace(draft.layout, ranking=ranking))
    kind = _target_type(draft)
    arrays = []
    for field in kind:
        flat = pa.array(np.ascontiguousarray(values[field.name]).ravel())
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        arrays.append(flat)
    return _list_array(pa.StructArray.from_arrays(arrays, fields=list(kind)), counts)


def _list_array(values: Any, counts: Sequence[int]) -> Any:
    flat = pa.array(values) if isinstance(values, np.ndarray) else values
    offsets = pa.array(np.cumsum([0, *counts], dtype=np.int64))
    return pa.LargeListArray.from_arrays(offsets, flat, type=_list_of(flat.type))


def _carried_array(name: str, kind: ColumnType, examples: Sequence[CachedExample]) -> Any:
    values = [example.columns[name] for example in examples]
    try:
        return pa.array(values, COLUMN_TYPES[kind])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"column {name!r}: holds a value that is no {kind} ({say(error)})"
        ) from error
