"""Where the bytes of a cache are: column by column, and everything else by its purpose.

    every file -> rows.arrow: buffers of each column, framing | hidden.zarr | index | ... -> dict

The entries add up to what the files occupy, so bytes per token quoted from them hide nothing.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cache.messages import BROKEN, read_buffers
from pipeline.cache.reader import TeacherCache
from pipeline.cache.shards import HIDDEN, ROWS
from pipeline.cache.signals.projection import FILE
from pipeline.cache.views.view import list_sources
from pipeline.errors import CacheError, say
from pipeline.storage import is_local, list_files, map_file

FRAMING = "(arrow framing)"
_FETCHED_SHARDS = 4  # of a store; the others are taken to be like them
_FILE_HEADER = 8  # "ARROW1" and two bytes of padding, then the stream format


def column_bytes(cache: TeacherCache) -> dict[str, int]:
    """Compressed bytes on disk, over the whole folder of a cache; of a view its share of each cache
    that it sees.

    Returns:
        Column of rows.arrow or field of its targets -> bytes; "hidden <signal>" for each signal;
        and in round brackets what is no column: arrow framing, index, tokenizer, projections, other
        files. The sum is that of all files, but for a view's own few; of a cache in a store the
        columns of a few shards stand for all.
    """
    sizes: Counter[str] = Counter()
    for source in list_sources(cache):
        for name, size in _sum_folder(source.cache.path).items():
            sizes[name] += round(size * source.share)
    return dict(sizes)


def _sum_folder(folder: Path) -> Counter[str]:
    sizes: Counter[str] = Counter()
    rows: dict[str, int] = {}
    for name, size in sorted(list_files(folder).items()):
        parts = tuple(name.split("/"))
        if parts[0] == "shards" and parts[-1] == ROWS:
            rows[name] = size
        else:
            sizes[_purpose(parts)] += size
    looked = list(rows) if is_local(folder) else list(rows)[:_FETCHED_SHARDS]
    columns: Counter[str] = Counter()
    for name in looked:
        columns.update(_sum_columns(folder / name))
    share = sum(rows.values()) / max(1, sum(rows[name] for name in looked))
    found = Counter({name: round(size * share) for name, size in columns.items()})
    sizes.update(found)
    sizes[FRAMING] += sum(rows.values()) - found.total()
    return sizes


def _purpose(parts: tuple[str, ...]) -> str:
    if parts[0] in ("index", "tokenizer"):
        return f"({parts[0]})"
    if HIDDEN in parts and len(parts) > parts.index(HIDDEN) + 2:
        return f"hidden {parts[parts.index(HIDDEN) + 1]}"
    if parts == (FILE,):
        return "(projections)"
    return "(other files)"


def _sum_columns(file: Path) -> Counter[str]:
    """Bytes of each column of rows.arrow, its buffers with their padding.

    Raises:
        CacheError: the file is damaged.
    """
    sizes: Counter[str] = Counter()
    try:
        opened = pa.BufferReader(map_file(file))
        opened.seek(_FILE_HEADER)
        schema = pa.ipc.read_schema(opened)
        owners = [owner for field in schema for owner in _name_buffers(field.name, field.type)]
        for message in pa.ipc.MessageReader.open_stream(opened):
            starts = [start for start, _ in read_buffers(message.metadata.to_pybytes()).places]
            ends = [*starts[1:], message.body.size]
            for owner, start, end in zip(owners, starts, ends, strict=True):
                sizes[owner] += end - start
    except BROKEN as error:
        raise CacheError(f"{file}: cannot be read ({say(error)}); copy the cache again") from error
    return sizes


def _name_buffers(name: str, kind: Any) -> Iterator[str]:
    """The column of each buffer of a record batch: validity, then offsets and values as there are.

    A field of a struct counts under its own name, what holds the structs together as framing.
    """
    structs = pa.types.is_large_list(kind) and pa.types.is_struct(kind.value_type)
    name = FRAMING if structs else name
    yield name
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _name_buffers(field.name, field.type)
    elif pa.types.is_fixed_size_list(kind):
        yield from _name_buffers(name, kind.value_type)
    elif pa.types.is_large_list(kind):
        yield name
        yield from _name_buffers(name, kind.value_type)
    else:
        yield from (name,) * (2 if pa.types.is_large_string(kind) else 1)
