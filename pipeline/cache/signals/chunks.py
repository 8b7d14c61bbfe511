"""Chunks of rows in the files of Zarr's sharding codec, written and read without Zarr.

    blocks of 512 rows -- ChunkWriter --> c/n/0: chunks, then their index -- ChunkReader --> blocks

Zarr's own reader gives the same numbers at a fifth of the speed, and its writer needs a whole file
in memory. The layout is fixed by the format (data/README.md), sizes are those of shard.json, so
that no settings are read to read a chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.storage import RangeReader, read_into

CHUNK_ROWS = 512
_FILE_BYTES = 32 * 2**20
_FILE_CHUNKS = 256  # the index of a file has 16 bytes for each, used or not
_ABSENT = 2**64 - 1  # chunks, and files, of nothing but zeros are left out
_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Kind:
    """What an array's rows are: `width` numbers of a numpy dtype."""

    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def file_chunks(self) -> int:
        """Chunks in one file."""
        return max(1, min(_FILE_CHUNKS, _FILE_BYTES // (CHUNK_ROWS * self.row_bytes)))

    @property
    def file_rows(self) -> int:
        """Rows in one file, a multiple of CHUNK_ROWS."""
        return CHUNK_ROWS * self.file_chunks


class ChunkWriter:
    """Appends to one array; of its file under way it holds the index alone.

    Attributes:
        rows: written so far.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = folder
        self._kind = kind
        self._index = np.full((kind.file_chunks, 2), _ABSENT, dtype="<u8")
        self._size = 0
        self.rows = 0

    def append(self, values: np.ndarray) -> None:
        """Write [512, W] rows; only the last block of an array may have fewer."""
        within = self.rows // CHUNK_ROWS % self._kind.file_chunks
        self.rows += len(values)
        chunk = np.ascontiguousarray(values, dtype=self._kind.dtype)
        if len(values) < CHUNK_ROWS:
            chunk = np.zeros((CHUNK_ROWS, self._kind.width), dtype=self._kind.dtype)
            chunk[: len(values)] = values
        if chunk.view(np.uint8).any():
            self._index[within] = self._size, chunk.nbytes + _CHECKSUM_BYTES
            self._write(chunk)
        if within == self._kind.file_chunks - 1:
            self.close()

    def close(self) -> None:
        """Complete the file under way, if there is one."""
        if self._size:
            self._write(self._index)
            self._index.fill(_ABSENT)
            self._size = 0

    def _write(self, content: np.ndarray) -> None:
        path = self._folder / "c" / str((self.rows - 1) // self._kind.file_rows) / "0"
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = int(google_crc32c.value(content)).to_bytes(_CHECKSUM_BYTES, "little")
        with path.open("ab") as file:  # so that nothing stays open where a capture breaks off
            file.write(content.data)
            file.write(checksum)
        self._size += content.nbytes + _CHECKSUM_BYTES


class ChunkReader:
    """The arrays of one shard, chunk by chunk.

    Args:
        path: the folder hidden.zarr.
        kinds: of the arrays by name.
        files: bytes and sha256 of each file by its path below the folder; others hold zeros.
    """

    def __init__(
        self, path: Path, kinds: Mapping[str, Kind], files: Mapping[str, tuple[int, str]]
    ) -> None:
        self._path = path
        self._kinds = kinds
        self._files = files
        self._indexes: dict[str, np.ndarray] = {}

    def read(self, name: str, block: int) -> np.ndarray:
        """One chunk, [CHUNK_ROWS, W] in the dtype it is stored in; zeros after the last row.

        Raises:
            OSError: a file that cannot be read.
            ValueError: bytes that fail their checksum, or are not where they should be.
        """
        kind = self._kinds[name]
        file, start, size = self._locate(name, block)
        if start == _ABSENT:
            return np.zeros((CHUNK_ROWS, kind.width), dtype=kind.dtype)
        values = self._read_checked(file, start, size).view(kind.dtype)
        return values.reshape(CHUNK_ROWS, kind.width)

    def read_ahead(self, name: str, block: int) -> None:
        """Begin to fetch a chunk that will be read soon; raises what `read` does."""
        file, start, size = self._locate(name, block)
        if start != _ABSENT:
            RangeReader(self._path / file, self._files[file][1]).read_ahead([(start, size)])

    def _locate(self, name: str, block: int) -> tuple[str, int, int]:
        """The file of a chunk, where it begins, _ABSENT if it is zeros, and its bytes."""
        kind = self._kinds[name]
        number, within = divmod(block, kind.file_chunks)
        file = f"{name}/c/{number}/0"
        if file not in self._files:
            return file, _ABSENT, 0
        if file not in self._indexes:
            self._indexes[file] = self._read_index(file, kind.file_chunks)
        start, size = (int(value) for value in self._indexes[file][within])
        whole = CHUNK_ROWS * kind.row_bytes + _CHECKSUM_BYTES
        if start != _ABSENT and (size != whole or start + size > self._files[file][0]):
            raise ValueError(f"{file} says that a chunk has {size:,} bytes at {start:,}")
        return file, start, size

    def _read_index(self, file: str, chunks: int) -> np.ndarray:
        """[chunks, 2]: where each begins, and its bytes with the checksum."""
        size = chunks * 16 + _CHECKSUM_BYTES
        if self._files[file][0] < size:
            raise ValueError(f"{file} is smaller than its index")
        content = self._read_checked(file, self._files[file][0] - size, size)
        return content.view("<u8").reshape(chunks, 2)

    def _read_checked(self, file: str, start: int, size: int) -> np.ndarray:
        """Bytes of a file without the checksum at their end."""
        content = np.empty(size, dtype=np.uint8)
        version = self._files[file][1]
        path = self._path / file
        if not read_into(path, start, content.data, version, _ends_in_its_checksum):
            raise ValueError(f"{file} fails its checksum")
        return content[:-_CHECKSUM_BYTES]


def _ends_in_its_checksum(content: Any) -> bool:
    values = np.frombuffer(content, dtype=np.uint8)
    checksum = int.from_bytes(values[-_CHECKSUM_BYTES:].tobytes(), "little")
    return bool(google_crc32c.value(values[:-_CHECKSUM_BYTES]) == checksum)
