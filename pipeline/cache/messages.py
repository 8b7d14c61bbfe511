"""What an Arrow message says of itself, read before Arrow believes it.

metadata (a flatbuffer) -- read_buffers --> places and codec of its buffers
    + body -- require_bounded --> bytes that it will take once decompressed, or a refusal

Arrow takes as much memory as the first eight bytes of each compressed buffer ask for, so a file of
a few bytes may claim terabytes. The layout is that of format/Message.fbs of Apache Arrow.
"""

import struct
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_LEAST = 2**30  # bytes that any record batch may take
_RATIO = 100  # times its size that a larger one may; ours take 2 to 20 times
_PREFIX = 8  # bytes before a compressed buffer: its length, or -1 where it is kept as it is
_MOST_BUFFERS = 2**20
# What the readers raise for bytes that make no sense: a wild length asks for petabytes of memory.
BROKEN = (
    *(OSError, EOFError, ValueError, LookupError, ArithmeticError, MemoryError),
    pa.ArrowException,
)

_MAGIC = b"ARROW1\0\0"
_RECORD_BATCH = 3  # of the union MessageHeader


@dataclass(frozen=True)
class Buffers:
    """The buffers of a record batch.

    Attributes:
        places: (offset in the body, bytes) of each.
        compressed: whether each begins with its length.
    """

    places: list[tuple[int, int]]
    compressed: bool


def read_buffers(metadata: bytes) -> Buffers:
    """The buffers of the record batch that a message announces.

    Raises:
        ValueError: it is no record batch, or makes no sense.
    """
    try:
        message = _read("I", metadata, 0)
        if _scalar("B", metadata, message, 1) != _RECORD_BATCH:
            raise ValueError("a message that is no record batch")
        batch = _follow(metadata, message, 2)
        vector = _follow(metadata, batch, 2)
        count = _read("I", metadata, vector)
        if count > _MOST_BUFFERS:
            raise ValueError(f"a record batch of {count:,} buffers")
        places = [
            (_read("q", metadata, at), _read("q", metadata, at + 8))
            for at in range(vector + 4, vector + 4 + 16 * count, 16)
        ]
        return Buffers(places, _field(metadata, batch, 3) is not None)
    except struct.error as error:
        raise ValueError("a message whose parts lie outside of it") from error


def require_bounded(message: Any) -> int:
    """The bytes that a record batch takes once it is decompressed.

    Args:
        message: a pyarrow.ipc.Message.

    Raises:
        ValueError: buffers outside the body, or more than anybody needs who wrote so little.
    """
    body = message.body
    found = read_buffers(message.metadata.to_pybytes())
    total = 0
    for start, size in found.places:
        if start < 0 or size < 0 or start + size > body.size:
            raise ValueError(f"a buffer of {size:,} bytes at {start:,} of {body.size:,}")
        claimed = size
        if found.compressed and size:
            if size < _PREFIX:
                raise ValueError("a compressed buffer without its length")
            claimed = _read("q", memoryview(body), start)
            claimed = size if claimed == -1 else claimed
        if claimed < 0:
            raise ValueError(f"a buffer that claims {claimed:,} bytes")
        total += claimed
    if total > max(_LEAST, _RATIO * body.size):
        raise ValueError(f"{body.size:,} bytes claim to hold {total:,}, more than any of ours")
    return total


def read_plain(content: Any) -> tuple[Any, list[Any]]:
    """Schema and record batches of a whole Arrow file that is not compressed, where they lie.

    Args:
        content: a buffer.

    Raises:
        ValueError, pa.ArrowException: it is no such file, or is compressed.
    """
    if content.size < len(_MAGIC) or content.slice(0, len(_MAGIC)).to_pybytes() != _MAGIC:
        raise ValueError("it is no Arrow file")
    source = pa.BufferReader(content.slice(len(_MAGIC)))
    schema, batches = pa.ipc.read_schema(source), []
    for message in pa.ipc.MessageReader.open_stream(source):
        require_bounded(message)
        if read_buffers(message.metadata.to_pybytes()).compressed:
            raise ValueError("it is compressed")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        batches.append(batch)
    return schema, batches


def _field(data: Any, table: int, field: int) -> int | None:
    """Position of a field of a flatbuffer table; None where it is left out."""
    fields = table - _read("i", data, table)
    if 4 + 2 * field >= _read("H", data, fields):
        return None
    place = _read("H", data, fields + 4 + 2 * field)
    return table + place if place else None


def _scalar(kind: str, data: Any, table: int, field: int) -> int:
    at = _field(data, table, field)
    return 0 if at is None else _read(kind, data, at)


def _follow(data: Any, table: int, field: int) -> int:
    """Position of what a flatbuffer table refers to in a field."""
    at = _field(data, table, field)
    if at is None:
        raise ValueError("a message without its parts")
    return at + _read("I", data, at)


def _read(kind: str, data: Any, at: int) -> int:
    if at < 0:
        raise struct.error("before the beginning")
    return int(struct.unpack_from(f"<{kind}", data, at)[0])
