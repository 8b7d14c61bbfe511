"""Hidden states of one shard: a Zarr v3 group with the sharding codec, its arrays by signal.

    [rows, D] of each example -- append --> blocks of 512 -- encode --> chunks --> files

A chunk is what a random read decodes, a file holds up to 32 MB of them. Chunks carry a CRC-32C and
are not compressed: zstd took 7 % off float16 and doubled the time of a read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from pipeline.cache.chunks import CHUNK_ROWS, ChunkReader, ChunkWriter, Kind
from pipeline.cache.manifest import Signal
from pipeline.cache.quantization import ENCODINGS, Block


def list_arrays(signals: Mapping[str, Signal]) -> dict[str, Kind]:
    """The arrays of all signals by name."""
    return {
        name + end: Kind(dtype, signal.width if end == "" else 1)
        for name, signal in signals.items()
        for end, dtype in ENCODINGS[signal.dtype].arrays.items()
    }


class HiddenWriter:
    """Appends the signals of one shard, less than a chunk of each waiting in memory."""

    def __init__(self, path: Path, signals: Mapping[str, Signal]) -> None:
        if signals:
            group = zarr.open_group(path, mode="w", zarr_format=3)
            arrays = {n: _create(group, n, kind) for n, kind in list_arrays(signals).items()}
        self._signals = {
            name: _SignalWriter(path, name, signal, arrays) for name, signal in signals.items()
        }

    def append(self, hidden: Mapping[str, Tensor]) -> None:
        """Add the rows of one example to every signal."""
        for name, signal in self._signals.items():
            signal.append(hidden[name])

    def close(self) -> None:
        """Write what waits."""
        for signal in self._signals.values():
            signal.close()


class _SignalWriter:
    """Appends to the arrays of one signal."""

    def __init__(self, path: Path, name: str, signal: Signal, arrays: Mapping[str, Any]) -> None:
        self._encoding = ENCODINGS[signal.dtype]
        names = [name + end for end in self._encoding.arrays]
        kinds = list_arrays({name: signal})
        self._arrays = [arrays[name] for name in names]
        self._files = [ChunkWriter(path / name, kinds[name]) for name in names]
        self._waiting: list[Tensor] = []
        self._rows = 0

    def append(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= CHUNK_ROWS:
            values = torch.cat(self._waiting)
            whole = self._rows // CHUNK_ROWS * CHUNK_ROWS
            self._write(values[:whole])
            self._waiting = [values[whole:].clone()]
            self._rows -= whole

    def close(self) -> None:
        if self._rows:
            self._write(torch.cat(self._waiting))
        for file, array in zip(self._files, self._arrays, strict=True):
            file.close()
            array.resize((file.rows, array.shape[1]))

    def _write(self, values: Tensor) -> None:
        for block in torch.split(values, CHUNK_ROWS):
            for file, part in zip(self._files, self._encoding.encode(block), strict=True):
                file.append(part)


class BlockReader:
    """The signals of one shard, block by block."""

    def __init__(self, path: Path, signals: Mapping[str, Signal], sizes: Mapping[str, int]) -> None:
        """Open nothing yet; see `ChunkReader`."""
        self._signals = signals
        self._chunks = ChunkReader(path, list_arrays(signals), sizes)

    def read(self, name: str, block: int) -> Block:
        """The block of 512 rows; raises what `ChunkReader.read` does."""
        encoding = ENCODINGS[self._signals[name].dtype]
        return Block(encoding, [self._chunks.read(name + end, block) for end in encoding.arrays])


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


def _create(group: Any, name: str, kind: Kind) -> Any:
    """The settings of an array; its files are written without Zarr."""
    return group.create_array(
        name,
        shape=(0, kind.width),
        chunks=(CHUNK_ROWS, kind.width),
        shards=(kind.file_rows, kind.width),
        dtype=kind.dtype,
        compressors=[Crc32cCodec()],
        fill_value=0,
    )
