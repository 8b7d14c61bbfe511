"""The index of a cache, made from its shards: when a cache is finished, compared, or mended.

    shards/NNNNN/rows.arrow, column by column -- write_index --> index/

Equal shards give an equal index.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.cache.index.contents import join_contents
from pipeline.cache.index.groups import group_rows, write_groups
from pipeline.cache.index.ids import write_ids
from pipeline.cache.index.splits import write_shards, write_split
from pipeline.cache.manifest import Draft
from pipeline.cache.shards import SHARD, read_column, shard_folder
from pipeline.storage import hash_file


def write_index(path: Path, draft: Draft, target: Path) -> str:
    """Index the shards of a cache, all of which stand.

    Args:
        path: the cache.
        target: the folder that index/ is written into: the cache itself, or another to compare.

    Returns:
        sha256 of index/shards.arrow.

    Raises:
        CacheError: a damaged shard.
        DataError: an example id that stands twice.
    """
    folders = [shard_folder(path, index) for index in range(draft.num_shards)]
    write_ids(target, _texts(folders, draft, "example_id"), _find_id(folders, draft))
    if "split" in draft.columns:
        write_split(target, _texts(folders, draft, "split"))
    for name in draft.columns:  # so that whoever samples by one that has few values reads none
        groups = group_rows(_arrays(folders, draft, name))
        if groups is not None:
            write_groups(target, name, groups)
    join_contents(target, folders)
    return write_shards(target, (hash_file(folder / SHARD) for folder in folders))


def _arrays(folders: Sequence[Path], draft: Draft, name: str) -> Iterator[Any]:
    return chain.from_iterable(read_column(folder, draft, name) for folder in folders)


def _texts(folders: Sequence[Path], draft: Draft, name: str) -> Iterator[Any]:
    return chain.from_iterable(array.to_pylist() for array in _arrays(folders, draft, name))


def _find_id(folders: Sequence[Path], draft: Draft) -> Callable[[int], str]:
    def id_of(row: int) -> str:
        shard, local = divmod(row, draft.shard_examples)
        return str(next(islice(_texts([folders[shard]], draft, "example_id"), local, None)))

    return id_of
