"""From split to rows, and the digest of each shard, without reading one; ids are in `ids`.

    index/split.arrow   runs of rows of one split; there where a column `split` is carried
    index/shards.arrow  sha256 of each shard.json
    index/columns/      runs of rows of each value of a column; see `groups`

All are mapped into memory, so that opening costs the same for ten rows as for 10^9.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.messages import BROKEN, read_plain
from pipeline.errors import CacheError, say
from pipeline.storage import hash_file, is_local, map_file, read_known, writing

SPLIT = "index/split.arrow"
SHARDS = "index/shards.arrow"
_DIGEST_BYTES = 32
RUNS = {"first_row": pa.int64(), "rows": pa.int64()}  # the columns of runs of rows
_SPLIT_KINDS = {"split": pa.large_string(), **RUNS}


def hash_id(example_id: str) -> int:
    """64 bits that are the same in every process and language."""
    digest = hashlib.blake2b(example_id.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def write_split(path: Path, splits: Iterable[str | None]) -> None:
    """Write index/split.arrow of a cache from the splits of all rows, in order."""
    runs = [(name, sum(1 for _ in rows)) for name, rows in groupby(splits)]
    names = pa.array([name for name, _ in runs], pa.large_string())
    counts = np.array([count for _, count in runs], dtype=np.int64)
    table = pa.table({"split": names, "first_row": np.cumsum(counts) - counts, "rows": counts})
    write_table(path / SPLIT, table)


def write_shards(path: Path, digests: Iterable[str]) -> str:
    """Write index/shards.arrow of a cache and return its own sha256.

    Args:
        digests: sha256 of each shard.json, in hex, in order.
    """
    values = [bytes.fromhex(digest) for digest in digests]
    write_table(path / SHARDS, pa.table({"sha256": pa.array(values, pa.binary(_DIGEST_BYTES))}))
    return hash_file(path / SHARDS)


def read_shards(path: Path, digest: str, count: int) -> np.ndarray:
    """Map index/shards.arrow into memory: [count, 32] bytes.

    Raises:
        CacheError: it is not the one that the manifest was written with.
    """
    file = path / SHARDS
    content = None if is_local(path) else read_known(file, digest)
    column = read_table(file, {"sha256": pa.binary(_DIGEST_BYTES)}, content)["sha256"]
    found = hash_file(file) if content is None else hashlib.sha256(content).hexdigest()
    if found != digest or len(column) != count:
        raise CacheError(
            f"{path / SHARDS}: is not the one that the manifest was written with; copy the cache"
            " again"
        )
    buffer = column.chunk(0).buffers()[1]
    return np.frombuffer(buffer, dtype=np.uint8)[: count * _DIGEST_BYTES].reshape(count, -1)


class RowRuns(Sequence[int]):
    """Ascending rows, held as runs of neighbours: 10^9 rows of one split take no more than ten.

    An int gives an int; a slice, a mask or places give an array [n] int64, as does `np.asarray`.

    Attributes:
        starts: [runs], the first row of each; counts: how many follow one another.
    """

    def __init__(self, starts: np.ndarray, counts: np.ndarray) -> None:
        self.starts = starts
        self.counts = counts
        self._ends = np.cumsum(counts)
        self._shifts = starts - (self._ends - counts)  # from a place to its row

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, places: Any) -> Any:
        if isinstance(places, int) and 0 <= places < len(self):  # numpy takes five times as long
            return places + int(self._shifts[bisect_right(self._ends, places)])
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)), dtype=np.int64)
        at = np.asarray(places)
        if at.dtype == bool:
            at = np.flatnonzero(at)
        at = np.where(at < 0, at + len(self), at)
        if at.size and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"place {places} of {len(self):,} rows")
        rows = at + self._shifts[np.searchsorted(self._ends, at, side="right")]
        return rows if rows.ndim else int(rows)

    @classmethod
    def of(cls, rows: np.ndarray) -> "RowRuns":
        """Ascending rows, [n], as runs."""
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        return cls(rows[starts], np.diff(starts, append=len(rows)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows: np.ndarray = self[:]
        return rows if dtype is None else rows.astype(dtype)

    def tolist(self) -> list[int]:
        """All rows."""
        rows: list[int] = self[:].tolist()
        return rows


def hex_digest(digests: np.ndarray, index: int) -> str:
    """The sha256 of one shard.json, in hex, of those that `read_shards` gave."""
    return bytes(digests[index].tobytes()).hex()


def find_split(path: Path, split: str) -> RowRuns:
    """Rows of a split; none where it is unknown."""
    runs = read_table(path / SPLIT, _SPLIT_KINDS)
    mine = pc.fill_null(pc.equal(runs["split"], split), False).to_numpy()
    return RowRuns(runs["first_row"].to_numpy()[mine], runs["rows"].to_numpy()[mine])


def list_splits(path: Path) -> list[str]:
    """Names of all splits."""
    return [
        name
        for name in pc.unique(read_table(path / SPLIT, _SPLIT_KINDS)["split"]).to_pylist()
        if name is not None
    ]


def require_runs(runs: RowRuns, limit: int, file: Path) -> RowRuns:
    """The runs that a file told, which must be ascending rows below a limit.

    Raises:
        CacheError: they are not.
    """
    starts, counts = runs.starts, runs.counts
    fits = (counts > 0) & (counts <= limit) & (starts >= 0) & (starts <= limit - counts)
    if not fits.all() or not (starts[1:] >= (starts + counts)[:-1]).all():
        raise CacheError(
            f"{file}: its runs are not ascending rows below {limit:,}; copy the cache again, or run"
            " `stillroom verify --repair`"
        )
    return runs


def write_table(file: Path, table: Any) -> None:
    """Write a file of the index."""
    # One batch, not compressed, so that it can be searched where it lies.
    with (
        writing(file) as local,
        pa.OSFile(str(local), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_table(
    file: Path, kinds: Mapping[str, Any] | None = None, content: bytes | None = None
) -> Any:
    """Map a file of the index into memory: a table of one chunk.

    Args:
        kinds: column -> Arrow type, as they are expected; texts may be null, nothing else.
        content: its bytes, where they have been read.

    Raises:
        CacheError: it is missing or damaged, or has other columns.
    """
    try:
        schema, batches = read_plain(map_file(file) if content is None else pa.py_buffer(content))
        found = {field.name: field.type for field in schema}
        kinds = found if kinds is None else kinds
        if found != dict(kinds):
            raise ValueError(f"it has the columns {', '.join(found)[:200]}")
        table = pa.Table.from_batches(batches, schema).combine_chunks()
        for name, kind in kinds.items():
            if table[name].null_count and kind != pa.large_string():
                raise ValueError(f"column {name} has nulls")
        return table
    except BROKEN as error:
        raise CacheError(
            f"{file}: cannot be read ({say(error)}); run `stillroom verify --repair`, or copy it"
        ) from error
