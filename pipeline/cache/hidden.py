"""Hidden states of one shard: a Zarr v3 group with the sharding codec, one array per signal.

    [rows, D] of each example -- append --> full blocks -- Zarr --> files -- `chunks` --> blocks

Chunks of 512 rows are what a random read decodes; a Zarr shard of up to 32 MB is what one file
holds. Rows wait until a file is full, so no file is ever written twice. Chunks carry a CRC-32C and
are not compressed: zstd took 7 % off float16 and doubled the time of a read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from pipeline.cache.manifest import Signal

CHUNK_ROWS = 512
_FILE_BYTES = 32 * 2**20
_FILE_CHUNKS = 256  # the index of a file has 16 bytes for each, used or not


class HiddenWriter:
    """Appends the signals of one shard, holding at most one Zarr shard of each in memory."""

    def __init__(self, path: Path, signals: Mapping[str, Signal]) -> None:
        self._arrays: dict[str, Any] = {}
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in signals}
        self._rows = dict.fromkeys(signals, 0)
        if not signals:
            return
        group = zarr.open_group(path, mode="w", zarr_format=3)
        for name, signal in signals.items():
            self._arrays[name] = group.create_array(
                name,
                shape=(0, signal.width),
                chunks=(CHUNK_ROWS, signal.width),
                shards=(count_file_rows(signal), signal.width),
                dtype=signal.dtype,
                compressors=[Crc32cCodec()],
                fill_value=0,
            )

    def append(self, hidden: Mapping[str, Tensor]) -> None:
        """Add the rows of one example to every signal."""
        for name, array in self._arrays.items():
            values = hidden[name].numpy().astype(array.dtype)
            self._waiting[name].append(values)
            self._rows[name] += len(values)
            if self._rows[name] >= array.shards[0]:
                self._write(name, self._rows[name] // array.shards[0] * array.shards[0])

    def close(self) -> None:
        """Write what waits."""
        for name, rows in self._rows.items():
            if rows:
                self._write(name, rows)

    def _write(self, name: str, rows: int) -> None:
        array = self._arrays[name]
        values = np.concatenate(self._waiting[name])
        start = array.shape[0]
        array.resize((start + rows, array.shape[1]))
        array[start : start + rows] = values[:rows]
        self._waiting[name] = [values[rows:]]
        self._rows[name] = len(values) - rows


class LazySignals(Mapping[str, Tensor]):
    """The signals of one example, by name, each read when it is first asked for and then kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names = tuple(names)
        self._read = read
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            if name not in self._names:
                raise KeyError(name)
            self._kept[name] = self._read(name)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def count_file_rows(signal: Signal) -> int:
    """Rows of a signal that one file holds, a multiple of CHUNK_ROWS."""
    chunk = CHUNK_ROWS * signal.width * np.dtype(signal.dtype).itemsize
    return CHUNK_ROWS * max(1, min(_FILE_CHUNKS, _FILE_BYTES // chunk))
