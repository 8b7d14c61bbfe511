"""One example of a cache, as a student reads it, and whether the index finds it."""

from collections.abc import Iterator

import torch

from pipeline.cache.reader import TeacherCache
from pipeline.cache.shards import DAMAGED, shard_folder
from pipeline.cache.verifying.findings import Finding
from pipeline.cache.verifying.shards import find_faults, shorten
from pipeline.errors import StillroomError
from pipeline.identity import digest_example


def check_row(cache: TeacherCache, row: int) -> Iterator[Finding]:
    """What is wrong with the example of a row: its record batch, its vectors, its places in the
    index."""
    index = row // cache.manifest.shard_examples
    folder = shard_folder(cache.path, index)
    file = folder.relative_to(cache.path).as_posix()
    try:
        example = cache[row]
        for what in find_faults(example, cache.manifest):
            yield Finding("damage", file, what, index)
        for name, values in example.hidden.items():
            if not bool(torch.isfinite(values).all()):
                yield Finding("damage", file, f"row {row}: {name} holds NaN or infinity", index)
    except StillroomError as error:
        found = shorten(error, folder).removesuffix(f"; {DAMAGED}")
        yield Finding("damage", file, found, index)
        return
    try:
        content = digest_example(example)
        if digest_example(cache.by_id(example.example_id)) != content:
            yield Finding("index", "index", f"finds another row than {row} by its id")
        if cache.content(row) != content:
            yield Finding("index", "index/contents.arrow", f"has another content for row {row}")
    except StillroomError as error:
        yield Finding("index", "index", str(error))
