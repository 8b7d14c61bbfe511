"""What the index is made of: ids, contents and carried columns, one shard after the other.

    shards/NNNNN/ -- on this machine: column by column --> arrays
                  -- of a store: all of them at once, kept near --> arrays

A record batch is mostly targets, and a store gives it whole. So a shard is read once for all
columns, and one that this machine has written is not read at all.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cache.index.contents import CONTENTS, read_shard_contents
from pipeline.cache.manifest import Draft, ShardInfo, parse_shard
from pipeline.cache.shards import SHARD, read_column, read_columns, shard_folder
from pipeline.errors import CacheError
from pipeline.storage import is_local, kept_ranges, read_known

CONTENT = "content"


class Gathered:
    """The columns of all shards of a cache."""

    def __init__(self, path: Path, draft: Draft, digests: Sequence[str]) -> None:
        """Read nothing yet.

        Args:
            path: of the cache.
            draft: what it is begun with.
            digests: sha256 of each shard.json.
        """
        self._path = path
        self._draft = draft
        self._digests = digests

    def arrays(self, name: str) -> Iterator[Any]:
        """A column of all rows, as Arrow arrays one after the other."""
        for index in range(self._draft.num_shards):
            yield from self.arrays_of(index, name)

    def texts(self, name: str) -> Iterator[Any]:
        """Its values."""
        for array in self.arrays(name):
            yield from array.to_pylist()

    def contents(self) -> list[Any] | None:
        """The contents of all rows, as Arrow arrays; None where a shard was written before there
        were any."""
        found: list[Any] = []
        for index in range(self._draft.num_shards):
            arrays = self._contents_of(index)
            if arrays is None:
                return None
            found += arrays
        return found

    def arrays_of(self, index: int, name: str) -> Iterator[Any]:
        """A column of one shard."""
        if is_local(self._path):
            return read_column(shard_folder(self._path, index), self._draft, name)
        return iter(self._table(index)[name].chunks)

    def _contents_of(self, index: int) -> list[Any] | None:
        folder = shard_folder(self._path, index)
        if is_local(self._path):
            there = (folder / CONTENTS).is_file()
            return [read_shard_contents(folder)] if there else None
        table = self._table(index)
        return list(table[CONTENT].chunks) if CONTENT in table.column_names else None

    def _table(self, index: int) -> Any:
        folder = shard_folder(self._path, index)
        content = kept_ranges().get(_name(folder, self._digests[index]))
        if content is not None:
            return pa.ipc.open_stream(pa.py_buffer(content)).read_all()
        file = folder / SHARD
        info = parse_shard(file, read_known(file, self._digests[index]))
        table = _gather(folder, self._draft, info)
        _keep(folder, self._digests[index], table)
        return table


def keep_columns(local: Path, folder: Path, draft: Draft, info: ShardInfo, digest: str) -> None:
    """Keep what the index needs of a shard that goes to a store.

    Args:
        local: the folder that it was written into.
        folder: where it goes; digest: sha256 of its shard.json.
    """
    if not is_local(folder):
        _keep(folder, digest, _gather(local, draft, info))


def _gather(folder: Path, draft: Draft, info: ShardInfo) -> Any:
    batches = list(read_columns(folder, draft, ["example_id", *draft.columns], info))
    table = pa.Table.from_batches(batches)
    if CONTENTS not in info.files:
        return table
    contents = read_shard_contents(folder, info.files[CONTENTS][1])
    if len(contents) != len(table):
        raise CacheError(
            f"{folder / CONTENTS}: holds {len(contents):,} values, expected {len(table):,}; the"
            " shard is damaged, copy or cache it again"
        )
    return table.append_column(CONTENT, contents)


def _keep(folder: Path, digest: str, table: Any) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    kept_ranges().put(_name(folder, digest), sink.getvalue().to_pybytes())


def _name(folder: Path, digest: str) -> str:
    return f"{folder} {digest} columns"
