"""Writing one shard: examples in, record batches and chunks out, shard.json last.

    add(example) -- check --> waiting -- when there are enough --> record batch --> rows.arrow
                                 hidden -- when a file is full --> chunks --> hidden.zarr
    commit() -- contents.arrow, fsync --> shard.json

Memory holds one record batch and, of each signal, one file's worth of vectors.
"""

import hashlib
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa

from pipeline.cache.accepting import check_example, count_features
from pipeline.cache.checksums import sum_files
from pipeline.cache.codecs import Ranking
from pipeline.cache.columns import sum_columns
from pipeline.cache.documents import write_sealed
from pipeline.cache.gaps import hollow, require_few
from pipeline.cache.index.contents import write_contents
from pipeline.cache.manifest import Draft, ShardInfo
from pipeline.cache.rows import encode_batch, learn_ranking, make_schema
from pipeline.cache.shards import HIDDEN, ROWS, SHARD
from pipeline.cache.signals.hidden import HiddenWriter
from pipeline.cache.signals.projection import Bases
from pipeline.errors import CacheError, NumericalError
from pipeline.examples import CachedExample, Example
from pipeline.identity import digest_example
from pipeline.storage import sync_folder, sync_tree

# A record batch is what a random read decodes and what the writer holds in memory. Only an example
# that alone has more entries gets a larger one.
_BATCH_ENTRIES = 65_536
_BATCH_EXAMPLES = 256
_ZSTD_LEVEL = 1  # entropy coding is what packs byte planes; 3 saves 0.1 % and takes twice as long


class ShardWriter:
    """Takes the examples of one shard, in order, from one thread at a time."""

    def __init__(self, folder: Path, draft: Draft, index: int, bases: Bases) -> None:
        self._folder = folder
        self._draft = draft
        self._waiting: list[CachedExample] = []
        self._batches: list[tuple[int, int, int]] = []
        self._ids = hashlib.sha256()
        self._contents: list[bytes] = []
        self._info = {"index": index, "first_row": index * draft.shard_examples}
        self._counts = {"examples": 0, "targets": 0, "features": 0, "tokens": 0}
        self._skipped: dict[str, str] = {}
        self._ranking: Ranking | None = None
        self._written_features = 0
        self._waiting_entries = 0
        options = pa.ipc.IpcWriteOptions(compression=_find_compression(draft))
        self._sink = pa.OSFile(str(folder / ROWS), "wb")
        self._rows = pa.ipc.new_file(self._sink, make_schema(draft), options=options)
        self._bases = bases
        self._hidden = HiddenWriter(folder / HIDDEN, draft.signals, bases, first=index == 0)

    @property
    def bytes_written(self) -> int:
        """Bytes in rows.arrow so far."""
        return 0 if self._sink.closed else int(self._sink.tell())

    def add(self, example: CachedExample, lenient: bool = False) -> None:
        """Append an example.

        Args:
            lenient: skip it where a number of it is none, or cannot be kept.

        Raises:
            DataError: its counts, shapes, ids, labels or columns do not fit.
            NumericalError: it holds NaN, infinity, or a number that its dtype cannot hold.
        """
        subject = f"example {example.example_id!r}"
        try:
            check_example(example, self._draft)
            self._hidden.check(subject, example.hidden)
        except NumericalError as error:
            if not lenient:
                raise
            found = str(error).removeprefix(f"{subject}: ").partition(";")[0]
            self.skip(example, found)
        else:
            self._append(example)

    def skip(self, example: Example, reason: str) -> None:
        """Append an example that the teacher could not answer.

        Raises:
            DataError: too many are skipped.
        """
        self._skipped[example.example_id] = reason
        require_few(len(self._skipped), self._draft.num_examples, example.example_id, reason)
        self._append(hollow(example, self._draft), answered=False)

    def _append(self, example: CachedExample, answered: bool = True) -> None:
        layout = self._draft.layout
        entries = len(example.targets) * (layout.top_k + layout.tail_draws)
        if self._waiting and self._waiting_entries + entries > _BATCH_ENTRIES:
            self._write_batch()
        self._waiting.append(example)
        self._waiting_entries += entries
        self._hidden.append(example.hidden, answered)
        self._ids.update(f"{example.example_id}\n".encode())
        self._contents.append(digest_example(example))
        self._counts["examples"] += 1
        self._counts["targets"] += len(example.targets)
        self._counts["features"] += count_features(example, self._draft)
        self._counts["tokens"] += len(example.input_ids)
        if len(self._waiting) >= _BATCH_EXAMPLES:
            self._write_batch()

    def commit(self) -> tuple[ShardInfo, str]:
        """Write what waits, bring every file to the disk, then shard.json: what is in it, and its
        sha256."""
        expected = self._draft.shard_size(self._info["index"])
        if self._counts["examples"] != expected:
            raise CacheError(
                f"{self._folder}: {self._counts['examples']} examples were added, expected"
                f" {expected}; the data set has changed, cache it into another folder"
            )
        if self._waiting:
            self._write_batch()
        self._rows.close()
        self._sink.close()
        self._hidden.close()
        write_contents(self._folder, self._contents)
        sync_tree(self._folder)
        batches, columns = _sum_batches(self._folder / ROWS, self._batches, self._draft)
        info = ShardInfo(
            **self._info,
            **self._counts,
            batches=batches,
            ids=self._ids.hexdigest(),
            frequent_ids=str(self._ranking or ""),
            files=sum_files(self._folder),
            fidelity=self._hidden.fidelity,
            skipped=self._skipped,
            draft=self._draft.own_digest,
            projections=self._bases.digest,
            columns=columns,
        )
        digest = write_sealed(self._folder / SHARD, info.model_dump(mode="json"))
        sync_folder(self._folder)
        sync_folder(self._folder.parent)
        return info, digest

    def abandon(self) -> None:
        """Let go of rows.arrow where commit() did not come to it."""
        self._sink.close()

    def _write_batch(self) -> None:
        if self._ranking is None:  # from the first batch, so that memory need not hold two
            self._ranking = learn_ranking(self._waiting, self._draft)
        batch = encode_batch(self._waiting, self._draft, self._ranking, self._written_features)
        start = self._sink.tell()
        self._rows.write_batch(batch)
        self._batches.append((len(self._waiting), start, self._sink.tell() - start))
        self._written_features = self._counts["features"]
        self._waiting = []
        self._waiting_entries = 0


def _find_compression(draft: Draft) -> Any:
    name = draft.targets.compression
    if name == "none":
        return None
    return pa.Codec(name, _ZSTD_LEVEL if name == "zstd" else None)


def _sum_batches(
    rows: Path, batches: list[tuple[int, int, int]], draft: Draft
) -> tuple[list[tuple[int, int, int, int]], list[list[int]]]:
    """Add the CRC-32C of its bytes to (examples, start, bytes) of each record batch, and sum each
    of its columns."""
    summed, columns, schema = [], [], make_schema(draft)
    with rows.open("rb") as file:
        for examples, start, size in batches:
            file.seek(start)
            content = pa.py_buffer(file.read(size))
            summed.append((examples, start, size, google_crc32c.value(content)))
            columns.append(sum_columns(content, schema))
    return summed, columns
