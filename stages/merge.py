"""Several caches of one kind as a view: caches -> rows that are no second time -> view.json."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.cache import (
    CacheView,
    Part,
    RowRuns,
    TeacherCache,
    hash_rows,
    list_parts,
    require_alike,
    select_rows,
    write_view,
)
from pipeline.errors import ConfigError, MismatchError


def merge(paths: Sequence[Path], output: Path, console: Console | None = None) -> CacheView:
    """Write a view of all examples of several caches and open it; an example that several hold is
    taken of the first.

    Raises:
        MismatchError: caches of another teacher, tokenizer, task or other settings, or one id with
            several contents; names them.
        StillroomError: fewer than two caches, or one that cannot be opened.
    """
    if len(paths) < 2:
        raise ConfigError("merge: one cache is no two; give several caches, then the output")
    first, *others = (TeacherCache.open(path) for path in paths)
    parts, joined, twice = list(list_parts(first)), [first], 0
    for other in others:
        require_alike(first.path, first.manifest, other.path, other.manifest)
        fresh = np.ones(len(other), dtype=bool)
        for known in joined:
            fresh[_find_shared(known, other)] = False
        twice += int((~fresh).sum())
        parts += _take(other, fresh)
        joined.append(other)
    view = write_view(output, parts)
    told = f", {twice:,} that stand in several taken once" if twice else ""
    console = console or Console()
    console.print(
        f"{output}: a view of {len(view):,} examples of {len(paths)} caches{told}", soft_wrap=True
    )
    return view


def _take(cache: TeacherCache, wanted: np.ndarray) -> list[Part]:
    return select_rows(cache, RowRuns.of(np.flatnonzero(wanted)))


def _find_shared(known: TeacherCache, other: TeacherCache) -> np.ndarray:
    """The rows of `other` whose examples stand in `known` too.

    Ids are compared by their hashes first, so that no example of two caches is read that have none
    in common.
    """
    candidates = np.flatnonzero(np.isin(hash_rows(other), hash_rows(known)))
    shared = []
    for row in candidates.tolist():
        example_id = other[row].example_id
        there = known.find_row(example_id)
        if there is None:
            continue
        if known.content(there) != other.content(row):
            raise MismatchError(
                f"{other.path}: example {example_id!r} is another than in {known.path}; leave it"
                " out of one of them with `stillroom select`, or give it an id of its own"
            )
        shared.append(row)
    return np.array(shared, dtype=np.int64)
