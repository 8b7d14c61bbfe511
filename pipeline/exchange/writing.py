"""Plain columns to a file that is there whole or not at all.

    examples -- tabulate --> groups of rows -- Parquet, or lines of JSON --> <file>.draft --> <file>

Memory holds one group: at most 2^20 entries, or one example that alone has more.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from pipeline.cache import Manifest
from pipeline.cache.rows import COLUMN_TYPES
from pipeline.errors import StillroomError
from pipeline.examples import CachedExample
from pipeline.exchange.plain import HIDDEN, Ragged, name_carried, tabulate
from pipeline.runs import write_json
from pipeline.storage import writing

VERSION = 1  # of the plain columns
METADATA = b"stillroom"  # key of the facts in a Parquet file
_GROUP_ENTRIES = 2**20
_GROUP_EXAMPLES = 1024
_OF_THE_SHARDS = ("shard_examples", "shards", "projections", "head", "fidelity", "totals", "files")

Row = Mapping[str, Any]


def describe_cache(manifest: Manifest) -> dict[str, Any]:
    """What a reader of plain columns has to know of the cache, JSON values."""
    kept = manifest.model_dump(mode="json", exclude={*_OF_THE_SHARDS, "version", "checksum"})
    return {"plain_version": VERSION, "cache": manifest.digest, **kept}


def facts_file(jsonl: Path) -> Path:
    """Where the facts of a file of JSON lines stand."""
    return jsonl.with_name(f"{jsonl.name}.manifest.json")


def write_parquet(
    file: Path, manifest: Manifest, examples: Iterable[CachedExample], hidden: bool = False
) -> None:
    """Write examples as Parquet, the facts of the cache in its metadata.

    Raises:
        StillroomError: the disk refuses.
    """
    schema = _make_schema(manifest, hidden)
    facts = json.dumps(describe_cache(manifest), ensure_ascii=False)
    with (
        _whole(file) as sink,
        parquet.ParquetWriter(
            sink, schema.with_metadata({METADATA: facts}), compression="zstd"
        ) as writer,
    ):
        for group in _group(tabulate(e, manifest, hidden) for e in examples):
            arrays = [_to_array([row[f.name] for row in group], f.type) for f in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def write_jsonl(
    file: Path, manifest: Manifest, examples: Iterable[CachedExample], hidden: bool = False
) -> None:
    """Write examples as lines of JSON, the facts of the cache in a file beside it.

    Raises:
        StillroomError: the disk refuses.
    """
    with _whole(file) as sink:
        for example in examples:
            row = {k: _to_json(v) for k, v in tabulate(example, manifest, hidden).items()}
            sink.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        write_json(facts_file(file), describe_cache(manifest))


PLAIN_FORMATS: dict[str, Callable[[Path, Manifest, Iterable[CachedExample], bool], None]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
}


@contextmanager
def _whole(file: Path) -> Iterator[IO[bytes]]:
    """A file under another name, which it gets once it is written and on the disk."""
    try:
        with writing(file) as draft:
            try:
                with draft.open("wb") as sink:
                    yield sink
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StillroomError(
            f"{file}: cannot be written ({error.strerror or error}); nothing was left there, make"
            " room or choose another --output, and run the same command again"
        ) from error


def _make_schema(manifest: Manifest, hidden: bool) -> Any:
    names = ("input_ids", "segment_lengths", "target_positions", "label_ids")
    kinds = {"example_id": pa.large_string()}
    kinds |= {name: pa.large_list(pa.int32()) for name in names}
    per_target = pa.large_list(pa.float32())
    kinds |= {"label_log_probs": per_target}
    kinds |= {"ids": pa.large_list(pa.large_list(pa.int32()))}
    kinds |= {"log_probs": pa.large_list(per_target), "kept_mass": per_target}
    kinds |= {"logsumexp": pa.large_list(per_target)}
    if manifest.targets.tail_draws:
        kinds |= {"draw_ids": kinds["ids"], "draw_log_probs": kinds["log_probs"]}
    if hidden:
        kinds |= {HIDDEN + name: pa.large_list(per_target) for name in manifest.signals}
    kinds |= {name_carried(name): COLUMN_TYPES[kind] for name, kind in manifest.columns.items()}
    return pa.schema(list(kinds.items()))


def _group(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    total = 0
    for row in rows:
        size = sum(len(v.values) for v in row.values() if isinstance(v, Ragged))
        if group and (total + size > _GROUP_ENTRIES or len(group) == _GROUP_EXAMPLES):
            yield group
            group, total = [], 0
        group.append(row)
        total += size
    if group:
        yield group


def _to_array(values: Sequence[Any], kind: Any) -> Any:
    if isinstance(values[0], Ragged):
        inner = _to_list(np.concatenate([v.values for v in values]), [v.lengths for v in values])
        return _to_list(inner, [[len(v.lengths)] for v in values]).cast(kind)
    if isinstance(values[0], np.ndarray):
        return _to_list(np.concatenate(values), [[len(v)] for v in values]).cast(kind)
    return pa.array(values, kind)


def _to_list(values: Any, lengths: Sequence[Any]) -> Any:
    offsets = np.cumsum([0, *chain.from_iterable(lengths)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _to_json(value: Any) -> Any:
    if isinstance(value, Ragged):
        return [_to_json(found) for found in value.to_lists()]
    if isinstance(value, np.ndarray):
        if value.dtype == np.float32:  # the shortest decimal that is read as the same float32
            return [float(text) for text in value.astype(str)]
        return value.tolist()
    return value
