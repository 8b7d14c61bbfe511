"""From example id to row, by blocks of an index that are read when they are needed.

    index/ids.arrow        hash (uint64, ascending), row
    index/id_blocks.arrow  of every 8,192 of its rows: the first hash, where their bytes stand, CRCs

The hash is the first eight bytes, little endian, of blake2b over the id. Ids of equal hash stand
next to one another and are told apart by the ids themselves, in the shards.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from pipeline.cache.index.splits import hash_id, read_table, write_table
from pipeline.cache.messages import BROKEN
from pipeline.errors import CacheError, DataError
from pipeline.storage import RangeReader, map_file

IDS = "index/ids.arrow"
BLOCKS = "index/id_blocks.arrow"
_BLOCK_ROWS = 8192
_KEPT_BLOCKS = 256
_KINDS = {"hash": pa.uint64(), "row": pa.int64()}
_COLUMNS = tuple(_KINDS)
_BLOCK_KINDS = {
    "first_hash": pa.uint64(),
    "rows": pa.int64(),
    "hash_start": pa.int64(),
    "hash_crc": pa.uint32(),
    "row_start": pa.int64(),
    "row_crc": pa.uint32(),
}

Block = tuple[np.ndarray, np.ndarray]


def write_ids(path: Path, ids: Iterable[str], id_of: Callable[[int], str]) -> None:
    """Write the index of a cache's ids.

    Args:
        ids: of all rows, in order; passed through once.
        id_of: the id of a row, asked only where two hashes are equal.

    Raises:
        DataError: an id that stands twice.
    """
    hashes = np.fromiter((hash_id(example_id) for example_id in ids), dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    _require_unique(hashes, order, id_of)
    write_table(path / IDS, pa.table({"hash": hashes, "row": order.astype(np.int64)}))
    write_table(path / BLOCKS, _describe_blocks(map_file(path / IDS)))


class IdIndex:
    """Finds the rows of an id; what was read of the index last is kept.

    A cache that was written without blocks is one block, which nothing checks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[int, Block] = {}

    def find(self, example_id: str) -> list[int]:
        """Rows whose id has the hash of this one: nearly always one or none.

        Raises:
            CacheError: the index is missing or damaged.
        """
        wanted = np.uint64(hash_id(example_id))
        firsts = self._table["first_hash"]
        begin = max(int(np.searchsorted(firsts, wanted)) - 1, 0)
        end = int(np.searchsorted(firsts, wanted, side="right"))
        found: list[int] = []
        for block in range(begin, end):
            hashes, rows = self._block(block)
            first, last = (np.searchsorted(hashes, wanted, side) for side in ("left", "right"))
            found += rows[first:last].tolist()
        return found

    def read_hashes(self, count: int) -> np.ndarray:
        """[count] uint64, the hash of each row's id, by row.

        Raises:
            CacheError: the index is missing or damaged, or of another number of rows.
        """
        by_row = np.zeros(count, dtype=np.uint64)
        for block in range(len(self._table["first_hash"])):
            hashes, rows = self._block(block)
            if len(rows) and not 0 <= rows.min() <= rows.max() < count:
                raise self._damage(f"it speaks of rows beyond {count:,}")
            by_row[rows] = hashes
        return by_row

    @cached_property
    def _table(self) -> dict[str, np.ndarray]:
        if (self._path / BLOCKS).is_file():
            table = read_table(self._path / BLOCKS, _BLOCK_KINDS)
            return {name: table[name].to_numpy() for name in table.column_names}
        table = read_table(self._path / IDS, _KINDS)
        self._kept[0] = tuple(table[name].chunk(0).to_numpy() for name in _COLUMNS)
        return {"first_hash": np.zeros(1, np.uint64)}

    @cached_property
    def _file(self) -> RangeReader:
        return RangeReader(self._path / IDS)

    def _block(self, block: int) -> Block:
        found = self._kept.get(block)
        if found is None:
            hashes, rows = (self._read(block, name) for name in _COLUMNS)
            found = hashes.view("<u8"), rows.view("<i8")
            if len(self._kept) >= _KEPT_BLOCKS:
                self._kept.clear()
            self._kept[block] = found
        return found

    def _read(self, block: int, name: str) -> np.ndarray:
        start, rows, checksum = (
            int(self._table[column][block]) for column in (f"{name}_start", "rows", f"{name}_crc")
        )
        try:
            content = self._file.read(start, 8 * rows)
        except BROKEN as error:
            raise self._damage(str(error)) from error
        if google_crc32c.value(content) != checksum:
            raise self._damage(f"block {block} of column {name} fails its checksum")
        return np.frombuffer(content, np.uint8)

    def _damage(self, reason: str) -> CacheError:
        return CacheError(
            f"{self._path / IDS}: cannot be read ({reason}); the index is damaged, copy the cache"
            " again or run `stillroom verify --repair`"
        )


def _describe_blocks(file: Any) -> Any:
    """The table of the blocks of ids.arrow, a file of one uncompressed record batch."""
    batch = pa.ipc.open_file(file).get_batch(0)
    starts = np.arange(0, batch.num_rows, _BLOCK_ROWS)
    counts = np.minimum(_BLOCK_ROWS, batch.num_rows - starts)
    blocks = {"first_hash": batch["hash"].to_numpy()[starts], "rows": counts}
    for name in _COLUMNS:
        begin = batch[name].buffers()[1].address - file.address + 8 * starts
        pieces = (
            file.slice(a, 8 * n) for a, n in zip(begin.tolist(), counts.tolist(), strict=True)
        )
        blocks[f"{name}_start"] = begin
        blocks[f"{name}_crc"] = np.array([google_crc32c.value(p) for p in pieces], np.uint32)
    return pa.table(blocks)


def _require_unique(hashes: np.ndarray, rows: np.ndarray, id_of: Callable[[int], str]) -> None:
    seen: dict[str, int] = {}
    shared = np.zeros(len(hashes), dtype=bool)
    shared[1:] = hashes[1:] == hashes[:-1]
    shared[:-1] |= shared[1:]
    for row in rows[shared]:
        example_id = id_of(int(row))
        if example_id in seen:
            raise DataError(
                f"example {example_id!r}: stands twice, in rows {seen[example_id]} and {row};"
                " give every example an id of its own"
            )
        seen[example_id] = int(row)
