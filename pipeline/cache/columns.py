"""The bytes of each column of a record batch, summed, so that damage is told by its column.

bytes of a record batch -- find_message --> Arrow message -- sum_columns --> CRC-32C by column
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import google_crc32c
import pyarrow as pa

from pipeline.cache.messages import read_buffers, require_bounded

_MAGIC = b"ARROW1"


def find_message(content: Any) -> tuple[int, Any]:
    """Where the message of a record batch begins in some bytes of a file, and the message.

    Args:
        content: a buffer with the bytes of a record batch; those of the first begin with the file.

    Raises:
        pa.ArrowException, OSError: no such message.
        ValueError: one that claims more than it can hold.
    """
    source = pa.BufferReader(content)
    if content.slice(0, len(_MAGIC)).to_pybytes() == _MAGIC:
        source.seek(len(_MAGIC) + 2)  # padded to eight bytes
        pa.ipc.read_message(source)  # the schema
    start = source.tell()
    message = pa.ipc.read_message(source)
    require_bounded(message)
    return start, message


def sum_columns(content: Any, schema: Any) -> list[int]:
    """CRC-32C of the bytes of each column: from its first buffer to the first of the next.

    Args:
        content: see `find_message`.

    Raises:
        ValueError, pa.ArrowException, OSError: it is no record batch of this schema.
    """
    _, message = find_message(content)
    places = read_buffers(message.metadata.to_pybytes()).places
    counts = [_count_buffers(field.type) for field in schema]
    if sum(counts) != len(places):
        raise ValueError(f"{len(places)} buffers, expected {sum(counts)}")
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    edges = [*(places[first][0] for first in firsts), message.body.size]
    pairs = pairwise(edges)
    return [google_crc32c.value(message.body.slice(start, end - start)) for start, end in pairs]


def name_damaged(content: Any, schema: Any, sums: Sequence[int]) -> Iterator[str]:
    """The columns whose bytes are not those of `sum_columns`, as far as can be told."""
    try:
        found = sum_columns(content, schema)
    except (OSError, ValueError, LookupError, MemoryError, OverflowError, pa.ArrowException):
        return  # what tells where the columns are is damaged itself
    for name, one, other in zip(schema.names, found, sums, strict=False):
        if one != other:
            yield name


def _count_buffers(kind: Any) -> int:
    """Buffers of an array: of its own, and of what it lists or holds."""
    if pa.types.is_struct(kind):
        return 1 + sum(_count_buffers(field.type) for field in kind)
    if pa.types.is_fixed_size_list(kind):
        return 1 + _count_buffers(kind.value_type)
    if pa.types.is_large_list(kind):
        return 2 + _count_buffers(kind.value_type)
    return 3 if pa.types.is_large_string(kind) else 2
