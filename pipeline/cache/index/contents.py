"""What stands in each row, by content: 16 bytes for an example, whatever cache it is in.

    example -- digest_example --> shards/NNNNN/contents.arrow -- joined --> index/contents.arrow

Equal contents are equal examples: ids, tokens, documents, targets, labels and carried columns. What
the teacher said of them is no part of it. So whoever compares two data sets, or a data set and a
cache, reads no example.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.index.splits import read_table, write_table
from pipeline.cache.manifest import Draft
from pipeline.cache.shards import SHARD, shard_folder
from pipeline.errors import CacheError
from pipeline.examples import Example
from pipeline.identity import CONTENT_BYTES, digest_example
from pipeline.storage import read_known

CONTENTS = "contents.arrow"
CONTENTS_INDEX = f"index/{CONTENTS}"
_KINDS = {"content": pa.binary(CONTENT_BYTES)}


def write_contents(folder: Path, contents: Sequence[bytes]) -> None:
    """Write those of a shard's rows, in order, into its folder."""
    values = pa.array(contents, pa.binary(CONTENT_BYTES))
    write_table(folder / CONTENTS, pa.table({"content": values}))


def read_shard_contents(folder: Path, sha256: str | None = None) -> Any:
    """Those of a shard's rows, as an Arrow array.

    Args:
        sha256: of the file, where that is known: of a store it is then one request.

    Raises:
        CacheError: the file is missing or damaged.
    """
    content = None if sha256 is None else read_known(folder / CONTENTS, sha256)
    return read_table(folder / CONTENTS, _KINDS, content)["content"].combine_chunks()


def write_index_contents(path: Path, contents: Sequence[Any]) -> None:
    """Write index/contents.arrow of a cache from the arrays of its shards, in order."""
    joined = pa.chunked_array(contents, pa.binary(CONTENT_BYTES)).combine_chunks()
    write_table(path / CONTENTS_INDEX, pa.table({"content": joined}))


def read_contents(path: Path, count: int) -> np.ndarray | None:
    """Map index/contents.arrow into memory: [count, 16] uint8; None for a cache written before it.

    Raises:
        CacheError: it is damaged, or of another cache.
    """
    if not (path / CONTENTS_INDEX).is_file():
        return None
    column = read_table(path / CONTENTS_INDEX, _KINDS)["content"].combine_chunks()
    if len(column) != count:
        raise CacheError(
            f"{path / CONTENTS_INDEX}: holds {len(column):,} values, expected {count:,}; copy the"
            " cache again"
        )
    taken: np.ndarray = np.frombuffer(column.buffers()[1], np.uint8, count * CONTENT_BYTES)
    return taken.reshape(count, CONTENT_BYTES)


def find_other(path: Path, draft: Draft, examples: Iterable[Example]) -> str | None:
    """The id of the first example that is not what stands in its row; None where all are, or where
    those of its shard are not known.

    Args:
        path: of a cache, finished or under way.
        examples: those that it is to hold, in order.
    """
    rows = chain.from_iterable(
        _read_shard(shard_folder(path, index), draft.shard_size(index))
        for index in range(draft.num_shards)
    )
    for example, known in zip(examples, chain(rows, repeat(b"")), strict=False):
        if known is not None and known != digest_example(example):
            return example.example_id
    return None


def _read_shard(folder: Path, count: int) -> Iterable[bytes | None]:
    """The contents of a shard's rows, None for each where it does not stand."""
    if not all((folder / name).is_file() for name in (SHARD, CONTENTS)):
        return repeat(None, count)
    found: list[bytes] = read_shard_contents(folder).to_pylist()
    return found


def digest_set(contents: np.ndarray) -> str:
    """One digest for a set of examples, whatever their order: of the sorted contents.

    Args:
        contents: [n, 16] uint8.
    """
    rows = np.ascontiguousarray(contents).view(f"V{CONTENT_BYTES}")[:, 0]
    return hashlib.blake2b(np.sort(rows).tobytes(), digest_size=32).hexdigest()
