"""From example id to row, and from split to rows, without reading a shard.

    index/ids.arrow    hash (uint64, ascending), row: memory-mapped, searched by bisection
    index/split.arrow  split of every row, in row order; there where a column `split` is carried

The hash is the first eight bytes, little endian, of blake2b over the id. Ids of equal hash stand
next to one another and are told apart by the ids themselves, in the shards.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import CacheError, DataError

IDS = "index/ids.arrow"
SPLIT = "index/split.arrow"


def hash_id(example_id: str) -> int:
    """64 bits that are the same in every process and language."""
    digest = hashlib.blake2b(example_id.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def write_ids(path: Path, ids: Iterable[str], id_of: Callable[[int], str]) -> None:
    """Write index/ids.arrow of a cache.

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
    table = pa.table({"hash": hashes, "row": order.astype(np.int64)})
    _write(path / IDS, table)  # not compressed, so that it can be searched where it lies


def write_split(path: Path, split: Sequence[str | None]) -> None:
    """Write index/split.arrow of a cache."""
    values = pa.array(split, pa.string()).dictionary_encode()
    _write(path / SPLIT, pa.table({"split": values}), compression="zstd")


def read_ids(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Map index/ids.arrow into memory: hashes, ascending, and their rows."""
    table = _read(path / IDS)
    return table["hash"].chunk(0).to_numpy(), table["row"].chunk(0).to_numpy()


def read_split(path: Path) -> Any:
    """The split of every row, a pyarrow ChunkedArray."""
    return _read(path / SPLIT)["split"]


def find_rows(index: tuple[np.ndarray, np.ndarray], example_id: str) -> np.ndarray:
    """Rows whose id has the hash of this one: nearly always one or none."""
    hashes, rows = index
    wanted = np.uint64(hash_id(example_id))
    first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
    return rows[first:last]


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


def _write(file: Path, table: Any, compression: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=options) as writer,
    ):
        writer.write_table(table)


def _read(file: Path) -> Any:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise CacheError(
            f"{file}: cannot be read ({error}); run `stillroom cache-teacher` again"
        ) from error
