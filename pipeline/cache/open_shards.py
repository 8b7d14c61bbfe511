"""The shards of one cache, opened when they are first needed, and examples read out of them.

    row -> shard -> record batch, chunks of signals -> CachedExample

At most 32 shards are open at a time, and what was decompressed last is kept up to 256 MiB; caches
that a view reads together share that.
"""

from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.accepting import find_shift
from pipeline.cache.ahead import Ahead
from pipeline.cache.index.splits import hex_digest, read_shards
from pipeline.cache.manifest import Manifest
from pipeline.cache.opened import Forks, Opened
from pipeline.cache.record_batch import Batch
from pipeline.cache.shards import Shard, read_column, shard_folder
from pipeline.cache.signals.chunks import CHUNK_ROWS
from pipeline.cache.signals.hidden import LazySignals
from pipeline.cache.signals.quantization import Block
from pipeline.errors import CacheError
from pipeline.examples import CachedExample


class OpenShards:
    """Reads the rows of a finished cache; safe in threads and after a fork."""

    def __init__(self, path: Path, manifest: Manifest, shared_by: int = 1) -> None:
        """Open nothing yet.

        Args:
            path: the cache's folder.
            shared_by: see `Opened`.
        """
        self._path = path
        self._manifest = manifest
        self._shared_by = shared_by
        self._state = Opened(shared_by)
        self._asked: set[str] = set()

    def read(self, row: int) -> CachedExample:
        """Read the example of a row of the cache; see `TeacherCache`."""
        index, local = divmod(row, self._manifest.shard_examples)
        batch, inside, key = self._batch(index, local)
        hidden: Mapping[str, torch.Tensor] = {}
        if self._manifest.signals:
            # Found now: by the time that a signal is asked for the batch may be forgotten.
            read = partial(self._read_hidden, index, local, batch.features(inside))
            hidden = LazySignals(self._manifest.signals, read)
        with self._opened.lock:
            example = batch.example(inside, hidden)
            if batch.is_spent():  # memory that is used again at once stays in the CPU's cache
                self._opened.batches.drop(key)
        if batch.is_shifted(inside):
            found = find_shift(example)
            raise self._damage(index, row, f"example {example.example_id!r} has {found}")
        return example

    def read_id(self, row: int) -> str:
        """The example id of a row."""
        batch, inside, _ = self._batch(*divmod(row, self._manifest.shard_examples))
        return batch.example_id(inside)

    def read_column(self, name: str) -> Iterator[Any]:
        """A column of all rows, as Arrow arrays one after the other."""
        for index in range(self._manifest.num_shards):
            self._open(index)  # checks it
            yield from read_column(shard_folder(self._path, index), self._manifest, name)

    def read_ahead(self, rows: np.ndarray) -> None:
        """Begin to fetch what coming rows need, with the signals that rows before were asked
        for."""
        opened = self._opened
        if opened.ahead is None:
            opened.ahead = Ahead(self._path, self._manifest, self._digests)
        opened.ahead.want(rows.tolist(), self._asked)

    @property
    def _opened(self) -> Opened:
        if self._state.forks != Forks.count:
            self._state = Opened(self._shared_by)
        return self._state

    @cached_property
    def _digests(self) -> np.ndarray:
        return read_shards(self._path, self._manifest.shards, self._manifest.num_shards)

    def _open(self, index: int) -> Shard:
        def open_shard() -> Shard:
            ahead = self._opened.ahead
            if ahead is not None and (shard := ahead.find(index)) is not None:
                return shard
            digest = hex_digest(self._digests, index)
            return Shard(shard_folder(self._path, index), self._manifest, digest)

        with self._opened.lock:
            return self._opened.shards.get(index, open_shard)

    def _batch(self, index: int, local: int) -> tuple[Batch, int, Hashable]:
        """The record batch of a shard's row, the row inside it, and the key it is kept under."""
        with self._opened.lock:
            shard = self._open(index)
            batch, inside = shard.locate(local)
            key = (index, batch)
            return self._opened.batches.get(key, lambda: shard.read_batch(batch)), inside, key

    def _read_hidden(self, index: int, local: int, features: slice, name: str) -> torch.Tensor:
        self._asked.add(name)
        signal = self._manifest.signals[name]
        rows = slice(local, local + 1) if signal.per == "example" else features
        info = self._open(index).info
        stored = info.examples if signal.per == "example" else info.features
        if rows.stop > stored:
            found = f"signal {name} has {stored} vectors, not {rows.stop}"
            raise self._damage(index, index * self._manifest.shard_examples + local, found)
        first, last = rows.start // CHUNK_ROWS, max(rows.stop - 1, rows.start) // CHUNK_ROWS
        picked = torch.empty(rows.stop - rows.start, signal.width)
        for block in range(first, last + 1):
            start = max(rows.start, block * CHUNK_ROWS)
            stop = min(rows.stop, (block + 1) * CHUNK_ROWS)
            inside = slice(start - block * CHUNK_ROWS, stop - block * CHUNK_ROWS)
            out = picked[start - rows.start : stop - rows.start]
            self._block(index, name, block).decode(inside, out)
        return picked

    def _block(self, index: int, name: str, block: int) -> Block:
        with self._opened.lock:
            shard = self._open(index)
            key = (index, name, block)
            return self._opened.blocks.get(key, lambda: shard.read_block(name, block))

    def _damage(self, index: int, row: int, found: str) -> CacheError:
        return CacheError(
            f"{shard_folder(self._path, index)}: row {row}: {found}; the shard is damaged or its"
            " targets belong to another text, cache the teacher again"
        )
