"""What coming rows need of a cache in a store, fetched while the rows before them are used.

    rows that come -- look_ahead --> Ahead, one thread: shard.json -> record batches, chunks
                                     -> storage.ranges, more threads -> kept near, or in memory

The order of an epoch is known, so nothing is fetched that will not be read, but for what is still
on its way when somebody stops. On a disk of this machine all this does nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.cache.index.splits import hex_digest
from pipeline.cache.manifest import Manifest
from pipeline.cache.shards import SHARD, Shard, shard_folder
from pipeline.cache.signals.chunks import CHUNK_ROWS
from pipeline.errors import StillroomError
from pipeline.storage import read_known_ahead

AHEAD_ROWS = 512
_STEP = 128  # rows after which it is looked ahead again
_OPEN_SHARDS = 32
_REMEMBERED = 4096  # parts that were wanted last, and are not fetched again


class Ahead:
    """Fetches for one cache; errors are left to whoever reads."""

    def __init__(self, path: Path, manifest: Manifest, digests: np.ndarray) -> None:
        self._path = path
        self._manifest = manifest
        self._digests = digests
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._wanted: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "stillroom-plan")

    def want(self, rows: Iterable[int], signals: Iterable[str]) -> None:
        """Begin to fetch what rows need: their targets, and these signals."""
        self._thread.submit(self._fetch, list(rows), sorted(signals))

    def find(self, index: int) -> Shard | None:
        """A shard that was opened to know what to fetch of it, so that nobody opens it again."""
        return self._shards.get(index)

    def _fetch(self, rows: Sequence[int], signals: Sequence[str]) -> None:
        size = self._manifest.shard_examples
        with suppress(StillroomError, OSError, ValueError, LookupError):
            shards: dict[int, list[int]] = {}
            for row in rows:  # what is needed first is fetched first
                shards.setdefault(row // size, []).append(row % size)
            for index in (index for index in shards if index not in self._shards):
                file = shard_folder(self._path, index) / SHARD
                read_known_ahead(file, hex_digest(self._digests, index))
            for index, within in shards.items():
                self._fetch_shard(index, sorted(within), signals)

    def _fetch_shard(self, index: int, rows: Sequence[int], signals: Sequence[str]) -> None:
        shard = self._open(index)
        places = [shard.locate(row) for row in rows]
        numbers = sorted({number for number, _ in places})
        shard.read_ahead([number for number in numbers if self._is_new(index, number)])
        for name in signals:
            whole = self._manifest.signals[name].per == "example"
            blocks = {row // CHUNK_ROWS for row in rows} if whole else _blocks(shard, places)
            for block in sorted(blocks):
                if self._is_new(index, name, block):
                    shard.read_block_ahead(name, block)

    def _open(self, index: int) -> Shard:
        if index not in self._shards:
            folder = shard_folder(self._path, index)
            self._shards[index] = Shard(folder, self._manifest, hex_digest(self._digests, index))
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        return self._shards[index]

    def _is_new(self, *part: object) -> bool:
        known = part in self._wanted
        self._wanted[part] = None
        self._wanted.move_to_end(part)
        if len(self._wanted) > _REMEMBERED:
            self._wanted.popitem(last=False)
        return not known


def _blocks(shard: Shard, places: Sequence[tuple[int, int]]) -> set[int]:
    """Where the features of rows are, which their record batches tell."""
    blocks: set[int] = set()
    for number, group in groupby(places, lambda place: place[0]):
        batch = shard.read_batch(number)
        for _, inside in group:
            rows = batch.features(inside)
            blocks |= set(range(rows.start // CHUNK_ROWS, -(-rows.stop // CHUNK_ROWS)))
    return blocks


class FetchesAhead(Protocol):
    """A cache, or a view of some."""

    @property
    def is_remote(self) -> bool: ...

    def read_ahead(self, rows: np.ndarray) -> None: ...


def look_ahead(cache: FetchesAhead, rows: np.ndarray) -> Iterator[int]:
    """The rows, each after what the next ones need was asked for."""
    if not cache.is_remote:
        yield from rows.tolist()
        return
    for start in range(0, len(rows), _STEP):
        first = start + AHEAD_ROWS - _STEP if start else 0
        cache.read_ahead(rows[first : start + AHEAD_ROWS])
        yield from rows[start : start + _STEP].tolist()
