"""The index of a cache, made from its shards: when a cache is finished, compared, or mended.

    shards/NNNNN -- Gathered --> ids, contents, columns -- write_index --> index/

Equal shards give an equal index.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from pipeline.cache.index.contents import write_index_contents
from pipeline.cache.index.gathering import Gathered
from pipeline.cache.index.groups import group_rows, write_groups
from pipeline.cache.index.ids import write_ids
from pipeline.cache.index.splits import write_shards, write_split
from pipeline.cache.manifest import Draft
from pipeline.cache.shards import SHARD, shard_folder
from pipeline.storage import hash_file


def write_index(
    path: Path, draft: Draft, target: Path, digests: Sequence[str] | None = None
) -> str:
    """Index the shards of a cache, all of which stand.

    Args:
        path: the cache.
        target: the folder that index/ is written into: the cache itself, or another to compare.
        digests: sha256 of each shard.json, where that is known.

    Returns:
        sha256 of index/shards.arrow.

    Raises:
        CacheError: a damaged shard.
        DataError: an example id that stands twice.
    """
    if digests is None:
        digests = [hash_file(shard_folder(path, i) / SHARD) for i in range(draft.num_shards)]
    shards = Gathered(path, draft, digests)
    write_ids(target, shards.texts("example_id"), _find_id(shards, draft))
    if "split" in draft.columns:
        write_split(target, shards.texts("split"))
    for name in draft.columns:  # so that whoever samples by one that has few values reads none
        groups = group_rows(shards.arrays(name))
        if groups is not None:
            write_groups(target, name, groups)
    contents = shards.contents()
    if contents is not None:
        write_index_contents(target, contents)
    return write_shards(target, digests)


def _find_id(shards: Gathered, draft: Draft) -> Callable[[int], str]:
    def id_of(row: int) -> str:
        shard, local = divmod(row, draft.shard_examples)
        ids = (i for array in shards.arrays_of(shard, "example_id") for i in array.to_pylist())
        return str(next(islice(ids, local, None)))

    return id_of
