"""Hidden states of one shard: a Zarr v3 group with the sharding codec, its arrays by signal.

    [rows, D] of each example -- append --> blocks of 512 -- project, encode --> chunks --> files

A chunk is what a random read decodes, a file holds up to 32 MB of them. Chunks carry a CRC-32C and
are not compressed: zstd took 7 % off float16 and doubled the time of a read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from pipeline.cache.signals.chunks import CHUNK_ROWS, ChunkReader, ChunkWriter, Kind
from pipeline.cache.signals.fidelity import Fidelity, Sample
from pipeline.cache.signals.projection import Bases
from pipeline.cache.signals.quantization import ENCODINGS, SCALE, Block, Encoding
from pipeline.cache.signals.spec import Signal, list_arrays
from pipeline.errors import NumericalError


class OutgrownError(NumericalError):
    """Vectors that a basis, which was just fitted to them, makes too large for their dtype. Written
    again with that basis, a shard knows whose they are before it takes them."""


class HiddenWriter:
    """Appends the signals of one shard, less than a chunk of each waiting in memory."""

    def __init__(
        self, path: Path, signals: Mapping[str, Signal], bases: Bases, first: bool
    ) -> None:
        """Begin the arrays.

        Args:
            path: the folder hidden.zarr.
            bases: of the cache; those that are missing are added.
            first: whether the shard is the cache's first, which bases are fitted to and whose
                fidelity is measured.
        """
        self.fidelity: dict[str, Fidelity] = {}
        if signals:
            group = zarr.open_group(path, mode="w", zarr_format=3)
            arrays = {n: _create(group, n, kind) for n, kind in list_arrays(signals).items()}
        self._signals = {
            name: _SignalWriter(path, name, signal, arrays, bases, first)
            for name, signal in signals.items()
        }

    def check(self, subject: str, hidden: Mapping[str, Tensor]) -> None:
        """Compare the vectors of an example, projected, with what their dtype can hold.

        Raises:
            NumericalError: they are too large; nothing is said where the basis is yet to be fitted.
        """
        for name, signal in self._signals.items():
            signal.check(subject, hidden[name])

    def append(self, hidden: Mapping[str, Tensor], answered: bool = True) -> None:
        """Add the rows of one example, which was checked, to every signal.

        Args:
            answered: whether they are the teacher's; others are kept, but no basis is fitted to
                them and no fidelity measured.
        """
        for name, signal in self._signals.items():
            signal.append(hidden[name], answered)

    def close(self) -> None:
        """Write what waits, then know the `fidelity` of each signal of a first shard.

        Raises:
            DataError: too few vectors to fit a projection to.
            OutgrownError: vectors that could not be checked; the bases stand now.
        """
        for signal in self._signals.values():
            signal.fit()
        for name, signal in self._signals.items():
            found = signal.close()
            if found is not None:
                self.fidelity[name] = found


class _SignalWriter:
    """Appends to the arrays of one signal; vectors without a basis wait for it in a file."""

    def __init__(
        self,
        path: Path,
        name: str,
        signal: Signal,
        arrays: Mapping[str, Any],
        bases: Bases,
        first: bool,
    ) -> None:
        self._name, self._signal, self._bases = name, signal, bases
        self._encoding = ENCODINGS[signal.dtype]
        names = [name + end for end in self._encoding.arrays]
        kinds = list_arrays({name: signal})
        self._arrays = [arrays[name] for name in names]
        self._files = [ChunkWriter(path / name, kinds[name]) for name in names]
        self._basis = bases.get(name)
        self._unfitted = path / f"{name}.unfitted"
        self._fits = signal.projection is not None and self._basis is None
        self._sample = Sample(signal.given_width) if first else None
        self._waiting: list[Tensor] = []
        self._rows = self._added = self._written = 0
        self._gaps: list[int] = []  # rows that stand for no answer

    def check(self, subject: str, rows: Tensor) -> None:
        if self._basis is None or not rows.numel():
            return
        # No component is longer than vector and mean together, so that few are projected twice.
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        if not float(lengths.max() + self._basis.mean.norm()) <= self._encoding.limit:
            self._require_room(rows, NumericalError, f"{subject}: ")

    def append(self, rows: Tensor, answered: bool) -> None:
        if not answered:
            self._gaps += range(self._added, self._added + len(rows))
        self._added += len(rows)
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= CHUNK_ROWS:
            values = torch.cat(self._waiting)
            whole = self._rows // CHUNK_ROWS * CHUNK_ROWS
            self._take(values[:whole])
            self._waiting = [values[whole:].clone()]
            self._rows -= whole

    def fit(self) -> None:
        """Take what waits, then find the basis, if it is to be found here."""
        if self._rows:
            self._take(torch.cat(self._waiting))
        projection = self._signal.projection
        if projection is not None and self._fits:
            self._basis = projection.fit(self._name, self._signal.given_width, self._read_answers)
            self._bases.add(self._name, self._basis)

    def close(self) -> Fidelity | None:
        if self._fits:
            for block in self._read_unfitted():
                self._require_room(block, OutgrownError)
                self._write(block)
            self._unfitted.unlink(missing_ok=True)
        for file, array in zip(self._files, self._arrays, strict=True):
            file.close()
            array.resize((file.rows, array.shape[1]))
        return None if self._sample is None else self._sample.measure(self._basis)

    def _take(self, values: Tensor) -> None:
        if self._signal.projection is not None and self._basis is None:
            with self._unfitted.open("ab") as file:
                file.write(values.float().numpy().tobytes())
            return
        for block in torch.split(values, CHUNK_ROWS):
            self._write(block)

    def _write(self, given: Tensor) -> None:
        values = given
        if self._basis is not None:
            # Checked example by example, which may round otherwise.
            limit = self._encoding.limit
            values = self._basis.project(given).clamp_(-limit, limit)
        parts = self._encoding.encode(values)
        for file, part in zip(self._files, parts, strict=True):
            file.append(part)
        if self._sample is not None:
            picked = self._sample.pick(len(given))
            read = torch.empty_like(values[picked], dtype=torch.float32)
            Block(self._encoding, parts).decode(picked, read)
            known = self._find_answers(self._written, len(given))[picked]
            if known.any():
                self._sample.add(given[picked][known].float(), read[known])
        self._written += len(given)

    def _require_room(
        self, given: Tensor, refusal: type[NumericalError], subject: str = ""
    ) -> None:
        assert self._basis is not None
        values = self._basis.project(given)
        if not bool((values.abs() <= self._encoding.limit).all()):
            raise refusal(
                f"{subject}hidden {self._name} holds numbers above the {self._encoding.limit:g} of"
                f" {self._signal.dtype} once it is projected; try another hidden.dtype"
            )

    def _find_answers(self, first: int, count: int) -> Tensor:
        """[count] bool, which rows from one on the teacher gave."""
        gaps = [gap - first for gap in self._gaps if first <= gap < first + count]
        known = torch.ones(count, dtype=torch.bool)
        known[gaps] = False
        return known

    def _read_answers(self) -> Iterator[Tensor]:
        """Of the vectors that wait those that the teacher gave."""
        first = 0
        for block in self._read_unfitted():
            yield block[self._find_answers(first, len(block))]
            first += len(block)

    def _read_unfitted(self) -> Iterator[Tensor]:
        """The vectors that wait, in blocks of 512, as often as they are asked for."""
        width = self._signal.given_width
        with self._unfitted.open("ab+") as file:
            file.seek(0)
            while len(values := np.fromfile(file, np.float32, CHUNK_ROWS * width)):
                yield torch.from_numpy(values).view(-1, width)


class BlockReader:
    """The signals of one shard, block by block."""

    def __init__(
        self, path: Path, signals: Mapping[str, Signal], files: Mapping[str, tuple[int, str]]
    ) -> None:
        """Open nothing yet; see `ChunkReader`."""
        self._signals = signals
        self._chunks = ChunkReader(path, list_arrays(signals), files)

    def read(self, name: str, block: int) -> Block:
        """The block of 512 rows; raises what `ChunkReader.read` does.

        Scales are compared with what a scale can be, so that vectors of 8-bit codes are finite. Of
        other dtypes only `verify` looks for NaN and infinity: a sum of squares, the cheapest look,
        adds a tenth to the time of reading them (4 to 17 %, width 768), asking each number more
        than the reading itself.
        """
        encoding = ENCODINGS[self._signals[name].dtype]
        parts = {end: self._chunks.read(name + end, block) for end in encoding.arrays}
        if SCALE in parts:
            _require_scales(parts[SCALE][:, 0], encoding, block)
        return Block(encoding, list(parts.values()))

    def read_ahead(self, name: str, block: int) -> None:
        """Begin to fetch a block that will be read soon; raises what `ChunkReader.read` does."""
        for end in ENCODINGS[self._signals[name].dtype].arrays:
            self._chunks.read_ahead(name + end, block)


def _require_scales(scales: np.ndarray, encoding: Encoding, block: int) -> None:
    wrong = np.flatnonzero(~(np.abs(scales) <= encoding.largest_scale))
    if len(wrong):
        raise ValueError(
            f"vector {block * CHUNK_ROWS + wrong[0]} of the shard has the scale"
            f" {scales[wrong[0]]:g}, expected at most {encoding.largest_scale:g}"
        )


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
