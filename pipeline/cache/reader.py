"""An opened cache: any example by row or by id, or a shuffled stream of all.

    manifest.json -> row or id -> shard (opened when first needed) -> record batch -> CachedExample

Opening reads the manifest and nothing else; `OpenShards` has what is open later, and how much. A
cache is safe in threads and after a fork, and is pickled as its path, so that it can be handed to
DataLoader workers.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.ahead import look_ahead
from pipeline.cache.checksums import require_listed
from pipeline.cache.index.contents import CONTENTS_INDEX, read_contents
from pipeline.cache.index.groups import MOST_GROUPS, group_rows, name_index, read_groups
from pipeline.cache.index.ids import BLOCKS, IDS, IdIndex
from pipeline.cache.index.splits import (
    SPLIT,
    RowRuns,
    find_split,
    list_splits,
    require_runs,
)
from pipeline.cache.manifest import Manifest, read_manifest
from pipeline.cache.names import require_own
from pipeline.cache.open_shards import OpenShards
from pipeline.cache.order import EpochOrder
from pipeline.cache.output_head import read_head
from pipeline.cache.views.file import is_view
from pipeline.errors import CacheError, did_you_mean
from pipeline.examples import CachedExample
from pipeline.heads import OutputHead
from pipeline.identity import CONTENT_BYTES, digest_example
from pipeline.storage import as_path, is_local, local_folder

STREAM_BLOCK = 64  # neighbouring rows that a stream keeps near one another
_ORDER_ROWS = 1024  # rows of an order that a stream asks for at a time


class TeacherCache:
    """A finished cache, read-only.

    Attributes:
        path: its folder.
        manifest: what it holds and what it was made from.
    """

    def __init__(self, path: Path, manifest: Manifest, shared_by: int = 1) -> None:
        """See `open`; a view's caches share what one may hold open."""
        self.path = path
        self.manifest = manifest
        self._shards = OpenShards(path, manifest, shared_by)
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: Path | str) -> "TeacherCache":
        """Open a cache or a view of several; no shard is touched.

        Raises:
            CacheError: no cache, an unfinished one, a damaged manifest, a newer format.
        """
        folder = as_path(path)
        if is_view(folder):
            from pipeline.cache.views.view import open_view  # which is made of caches

            return open_view(folder)
        require_own(folder)
        return cls(folder, read_manifest(folder))

    @property
    def tokenizer_path(self) -> Path:
        """A folder of this machine with the teacher's tokenizer, compared with the manifest."""
        self._require("tokenizer/")
        return local_folder(self.path / "tokenizer")

    def read_head(self) -> OutputHead:
        """The teacher's output head.

        Raises:
            CacheError: none is kept, or its file is damaged.
        """
        return read_head(self.path, self.manifest.head)

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache.open, (self.path,)

    def __len__(self) -> int:
        return self.manifest.num_examples

    def __getitem__(self, row: int) -> CachedExample:
        """Read one example; negative rows count from the end. Its targets are decoded, and a
        hidden signal is read, when they are first asked for.

        Raises:
            IndexError: outside the cache.
            CacheError: damaged, or targets that belong to another text.
        """
        return self._shards.read(self._count_up(row))

    def by_id(self, example_id: str) -> CachedExample:
        """Read the example of an id.

        Raises:
            CacheError: the cache has no such example.
        """
        row = self.find_row(example_id)
        if row is None:
            raise CacheError(
                f"{self.path}: has no example {example_id!r} among its {len(self):,}, of which the"
                f" first is {self[0].example_id!r}; give the id of one"
            )
        return self[row]

    def __contains__(self, example_id: object) -> bool:
        return isinstance(example_id, str) and self.find_row(example_id) is not None

    @cached_property
    def contents(self) -> np.ndarray:
        """[n, 16] uint8, the content of each row's example (see `digest_example`).

        A cache that was written without them is passed over.
        """
        self._require(CONTENTS_INDEX)
        found = read_contents(self.path, len(self))
        if found is not None:
            return found
        joined = b"".join(digest_example(self[row]) for row in range(len(self)))
        return np.frombuffer(joined, np.uint8).reshape(len(self), CONTENT_BYTES)

    def content(self, row: int) -> bytes:
        """The content of one row's example, 16 bytes."""
        return bytes(self.contents[row])

    def ids(self, split: str | None = None) -> Iterator[str]:
        """The ids, in stored order, of all examples or of one split."""
        wanted = None if split is None else set(self.split_indices(split).tolist())
        arrays = self._column("example_id")
        for row, example_id in enumerate(chain.from_iterable(a.to_pylist() for a in arrays)):
            if wanted is None or row in wanted:
                yield example_id

    def group(self, column: str) -> dict[str, RowRuns]:
        """The rows of each value of a carried column, as text, by the cache's index; a cache that
        was written without one is passed over.

        Raises:
            CacheError: it is not carried, or has more values than anybody groups by.
        """
        if column not in self.manifest.columns:
            hint = did_you_mean(column, self.manifest.columns)
            raise CacheError(f"{self.path}: carries no column {column!r}{hint}")
        groups = self._read_groups(column)
        if groups is None:
            groups = group_rows(self._column(column))
        if groups is None:
            raise CacheError(
                f"{self.path}: column {column!r} has lists or more than {MOST_GROUPS:,} values;"
                " group by one of few, such as language"
            )
        return groups

    @property
    def skipped(self) -> dict[str, str]:
        """The ids that the teacher could not answer, and why; no stream and no split has them."""
        return self.manifest.skipped

    @cached_property
    def answered(self) -> RowRuns:
        """The rows that the teacher answered, ascending: all but those skipped."""
        return self.leave_out(RowRuns(np.array([0]), np.array([len(self)])), self.skipped)

    def leave_out(self, rows: RowRuns, ids: Collection[str]) -> RowRuns:
        """Ascending rows without those of some ids, which the cache need not have."""
        if not ids:
            return rows
        gaps = [row for row in map(self.find_row, ids) if row is not None]
        return RowRuns.of(np.setdiff1d(np.asarray(rows), np.array(gaps, dtype=np.int64)))

    def split_indices(self, split: str) -> RowRuns:
        """Rows whose column `split` equals this one, ascending.

        Raises:
            CacheError: no split is carried, or none of this name, or none of it was answered.
        """
        if "split" not in self.manifest.columns:
            raise CacheError(
                f"{self.path}: carries no column 'split'; cache the teacher again with it"
            )
        rows = self.leave_out(self._find_split(split), self.skipped)
        if not len(rows):
            known = self._list_splits()
            if split in known:
                raise CacheError(
                    f"{self.path}: has no answer to any example of the split {split!r}; cache or"
                    " merge others"
                )
            raise CacheError(f"{self.path}: has no split {split!r}{did_you_mean(split, known)}")
        return rows

    def stream(
        self,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
        skip: int = 0,
    ) -> Iterator[CachedExample]:
        """Read one epoch: every `world_size`-th example of its `EpochOrder`, from `rank` on.

        Args:
            indices: the rows to visit, all by default; their order matters only without `shuffle`.
            skip: how many of its examples this rank has had; they are neither read nor counted up.
        """
        if indices is None and self.skipped:
            indices = self.answered
        count = len(self) if indices is None else len(indices)
        if indices is not None and not isinstance(indices, RowRuns):
            indices = np.sort(indices) if shuffle else np.asarray(indices)
        order = EpochOrder(count, STREAM_BLOCK, seed, epoch)
        step = world_size * _ORDER_ROWS
        for start in range(rank + skip * world_size, count, step):
            stop = min(start + step, count)
            places = np.arange(start, stop, world_size)
            if shuffle:
                places = order[start:stop:world_size]
            rows = np.asarray(places if indices is None else indices[places])
            yield from map(self.__getitem__, look_ahead(self, rows))

    @property
    def is_remote(self) -> bool:
        """Whether it lies in a store."""
        return not is_local(self.path)

    def read_ahead(self, rows: np.ndarray) -> None:
        """Begin to fetch what coming rows need, with the signals that rows before were asked for;
        nothing on a disk of this machine."""
        if self.is_remote:
            self._shards.read_ahead(rows)

    def _require(self, prefix: str) -> None:
        """Compare the files below a prefix with the manifest, the first time that they are read."""
        if prefix not in self._checked:
            require_listed(self.path, self.manifest.files, prefix)
            self._checked.add(prefix)

    @cached_property
    def _ids(self) -> IdIndex:
        self._require(BLOCKS)
        return IdIndex(self.path)

    def _count_up(self, row: int) -> int:
        at = row + len(self) if row < 0 else row
        if not 0 <= at < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self):,} examples")
        return at

    def _read_groups(self, column: str) -> dict[str, RowRuns] | None:
        self._require(name_index(column))
        groups = read_groups(self.path, column)
        for rows in (groups or {}).values():
            require_runs(rows, len(self), self.path / name_index(column))
        return groups

    def _find_split(self, split: str) -> RowRuns:
        self._require(SPLIT)
        return require_runs(find_split(self.path, split), len(self), self.path / SPLIT)

    def _list_splits(self) -> list[str]:
        return list_splits(self.path)

    def _column(self, name: str) -> Iterator[Any]:
        return self._shards.read_column(name)

    def find_row(self, example_id: str) -> int | None:
        """The row of an id; None where there is none."""
        for row in self._ids.find(example_id):
            if not 0 <= row < len(self):
                raise CacheError(f"{self.path / IDS}: names row {row}; copy the cache again")
            if self._shards.read_id(row) == example_id:
                return row
        return None
