"""The folder of one finished shard, opened for reading.

    shards/00000/  shard.json -> rows.arrow (record batches), hidden.zarr (chunks of 512 rows)

Everything read is checked against shard.json, and shard.json against the manifest, before a byte of
it is believed: a chunk that is missing would otherwise be read as zeros.
"""

import errno
import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import google_crc32c

from pipeline.cache.codecs import Ranking
from pipeline.cache.columns import name_damaged
from pipeline.cache.manifest import Draft, ShardInfo, parse_shard, read_shard
from pipeline.cache.messages import BROKEN
from pipeline.cache.names import require_inside
from pipeline.cache.record_batch import Batch
from pipeline.cache.rows import decode_batch, decode_columns, make_schema, target_columns
from pipeline.cache.shard_facts import require_consistent
from pipeline.cache.signals.hidden import BlockReader
from pipeline.cache.signals.quantization import Block
from pipeline.errors import CacheError, say
from pipeline.storage import RangeReader, is_local, read_known

ROWS = "rows.arrow"
HIDDEN = "hidden.zarr"
SHARD = "shard.json"

DAMAGED = "the shard is damaged, mend it with `stillroom verify --repair` or copy it again"
# What the machine refuses, whatever the bytes are.
_OUTSIDE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)
_GAP = 512 * 2**10  # bytes; a request takes a client as long as they do


def shard_folder(path: Path, index: int) -> Path:
    """<cache>/shards/<five digits>."""
    return path / f"shards/{index:05d}"  # joined once: a path of a store takes its time


def find_damage(folder: Path, info: ShardInfo) -> str | None:
    """The first file of a shard that is missing or has another size, None where all is there."""
    for name, (size, _) in info.files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            return f"{file}: is missing"
        if found != size:
            return f"{file}: has {found:,} bytes, expected {size:,}"
    return None


def read_columns(
    folder: Path, draft: Draft, names: Sequence[str], info: ShardInfo
) -> Iterator[Any]:
    """Columns of a shard as Arrow record batches, in order; no other column is decompressed.

    Raises:
        CacheError: rows.arrow is damaged.
    """
    schema = make_schema(draft)
    try:
        file = RangeReader(folder / ROWS, info.files[ROWS][1])
        for index, (rows, *_) in enumerate(info.batches):
            batch = decode_columns(_read_checked(file, info, index, schema), schema, names)
            if batch.num_rows != rows:
                raise ValueError(f"{batch.num_rows} rows, expected {rows}")
            yield batch
    except BROKEN as error:
        raise _name_damage(folder, error) from error


def read_column(folder: Path, draft: Draft, name: str) -> Iterator[Any]:
    """One column of a shard as Arrow arrays, in order; see `read_columns`."""
    for batch in read_columns(folder, draft, [name], read_shard(folder)):
        yield batch.column(0)


class Shard:
    """An open shard: finds the record batch of a row, reads batches and chunks."""

    def __init__(self, folder: Path, draft: Draft, sha256: str) -> None:
        """Open and check it.

        Raises:
            CacheError: a file is missing, of another size, or of another cache.
        """
        self._folder = folder
        self._name = str(folder)  # which takes a store's path as long as some columns to decode
        self._draft = draft
        self._kinds = target_columns(draft)
        file = folder / SHARD
        content = read_known(file, sha256)
        self.info = parse_shard(file, content)
        # A store has no half files, and asking it for each would take longer than reading them.
        damage = find_damage(folder, self.info) if is_local(folder) else None
        if hashlib.sha256(content).hexdigest() != sha256:
            damage = f"{file}: is not the one that the manifest was written for"
        if damage:
            raise CacheError(f"{damage}; {DAMAGED}")
        if is_local(folder):
            names = (SHARD, *self.info.files)
            require_inside(folder.parent.parent, (folder / name for name in names))
        self._batch_ends = list(accumulate(rows for rows, _, _, _ in self.info.batches))
        try:
            self._rows = RangeReader(folder / ROWS, self.info.files[ROWS][1])
            self._schema = make_schema(draft)
            require_consistent(self.info, draft, int(folder.name))
        except BROKEN as error:
            raise _name_damage(self._folder, error) from error

    @cached_property
    def _hidden(self) -> BlockReader:
        prefix = f"{HIDDEN}/"
        files = {
            name.removeprefix(prefix): file
            for name, file in self.info.files.items()
            if name.startswith(prefix)
        }
        return BlockReader(self._folder / HIDDEN, self._draft.signals, files)

    @cached_property
    def _ranking(self) -> Ranking:
        return Ranking.parse(self.info.frequent_ids, self._draft.num_classes)

    def locate(self, row: int) -> tuple[int, int]:
        """The record batch of a row of the shard, and the row inside it."""
        batch = bisect_right(self._batch_ends, row)
        return batch, row - (self._batch_ends[batch - 1] if batch else 0)

    def read_batch(self, index: int) -> Batch:
        """Decompress one record batch."""
        try:
            content = _read_checked(self._rows, self.info, index, self._schema)
            batch = decode_batch(content, self._schema)
            if batch.num_rows != self.info.batches[index][0]:
                raise ValueError(
                    f"it has {batch.num_rows} rows, expected {self.info.batches[index][0]}"
                )
            where = f"{self._name}: record batch {index} of {ROWS}"
            return Batch(batch, self._draft, self._kinds, self._ranking, where)
        except BROKEN as error:
            raise _name_damage(self._folder, error, f"record batch {index} of {ROWS}") from error

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to fetch record batches that will be read soon, and the few between two of them,
        which cost less than a request of their own."""
        batches = self.info.batches
        wanted = set(indices)
        for first, last in pairwise(sorted(wanted)):
            if batches[last][1] - sum(batches[first][1:3]) <= _GAP:
                wanted.update(range(first, last))
        self._rows.read_ahead([batches[index][1:3] for index in sorted(wanted)])

    def read_block_ahead(self, signal: str, block: int) -> None:
        """Begin to fetch 512 rows of a signal that will be read soon."""
        self._hidden.read_ahead(signal, block)

    def read_block(self, signal: str, block: int) -> Block:
        """Read 512 rows of a signal."""
        try:
            return self._hidden.read(signal, block)
        except BROKEN as error:
            raise _name_damage(self._folder, error, f"chunk {block} of {signal}") from error


def _read_checked(file: RangeReader, info: ShardInfo, index: int, schema: Any) -> Any:
    """The bytes of a record batch, compared with shard.json."""
    _, start, size, checksum = info.batches[index]

    def is_whole(content: Any) -> bool:
        return bool(google_crc32c.value(content) == checksum)

    content, whole = file.read_checked(start, size, is_whole)
    if not whole:
        sums = info.columns[index] if index < len(info.columns) else ()
        found = ", ".join(name_damaged(content, schema, sums))
        raise ValueError(f"{f'column {found}' if found else 'it'} fails its checksum")
    return content


def _name_damage(folder: Path, error: Exception, part: str = "") -> CacheError:
    where = f"{part}: " if part else ""
    if isinstance(error, OSError) and error.errno in _OUTSIDE:
        return CacheError(
            f"{folder}: cannot be read ({where}{say(error)}); see to the disk and to who may read"
            " there, and run the same command again"
        )
    return CacheError(f"{folder}: cannot be read ({where}{say(error)}); {DAMAGED}")
