"""Several caches of one kind as a view: caches -> rows that are no second time -> view.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.cache import (
    CacheView,
    Part,
    RowRuns,
    TeacherCache,
    hash_rows,
    require_alike,
    select_rows,
    write_view,
)
from pipeline.cache.gaps import unasked
from pipeline.errors import ConfigError, MismatchError
from pipeline.identity import digest_example


def merge(paths: Sequence[Path], output: Path, console: Console | None = None) -> CacheView:
    """Write a view of all examples of several caches and open it; an example that several hold is
    taken of the first that has an answer to it, and stays a gap where none has.

    Raises:
        MismatchError: caches of another teacher, tokenizer, task or other settings, or one id with
            several contents; names them.
        StillroomError: fewer than two caches, or one that cannot be opened.
    """
    if len(paths) < 2:
        raise ConfigError("merge: one cache is no two; give several caches, then the output")
    joined = [_Joined.of(TeacherCache.open(path)) for path in paths]
    first = joined[0].cache
    for at, other in enumerate(joined):
        require_alike(first.path, first.manifest, other.cache.path, other.cache.manifest)
        for known in joined[:at]:
            _take_once(known, other)
    twice = sum(int((~one.taken).sum()) for one in joined)
    view = write_view(output, [part for one in joined for part in one.list_parts()])
    told = f", {twice:,} that stand in several taken once" if twice else ""
    if closed := {name for one in joined for name in one.cache.skipped} - view.skipped.keys():
        told += f", {len(closed):,} that one could not answer taken of another"
    console = console or Console()
    console.print(
        f"{output}: a view of {len(view):,} examples of {len(paths)} caches{told}", soft_wrap=True
    )
    return view


@dataclass(frozen=True)
class _Joined:
    """A cache, and which of its rows the view takes.

    Attributes:
        taken: [n] bool.
    """

    cache: TeacherCache
    taken: np.ndarray

    @classmethod
    def of(cls, cache: TeacherCache) -> "_Joined":
        """All of its rows."""
        return cls(cache, np.ones(len(cache), dtype=bool))

    def list_parts(self) -> list[Part]:
        """Those that are taken."""
        return select_rows(self.cache, RowRuns.of(np.flatnonzero(self.taken)))


def _take_once(known: _Joined, other: _Joined) -> None:
    """Of the examples that two caches hold take the later one's only where it alone has an answer.

    Ids are compared by their hashes first, so that no example of two caches is read that have none
    in common.

    Raises:
        MismatchError: one id with two contents.
    """
    hashes = np.isin(hash_rows(other.cache), hash_rows(known.cache))
    for row in np.flatnonzero(hashes).tolist():
        name = other.cache[row].example_id
        there = known.cache.find_row(name)
        if there is None:
            continue
        gaps = [name in cache.skipped for cache in (known.cache, other.cache)]
        one = _find_content(known.cache, there, asked=gaps[0] == gaps[1])
        if one != _find_content(other.cache, row, asked=gaps[0] == gaps[1]):
            raise MismatchError(
                f"{other.cache.path}: example {name!r} is another than in {known.cache.path}; leave"
                " it out of one of them with `stillroom select`, or give it an id of its own"
            )
        loser, at = (known, there) if gaps == [True, False] else (other, row)
        loser.taken[at] = False


def _find_content(cache: TeacherCache, row: int, asked: bool) -> bytes:
    """The content of an example, or what it would be had nothing been asked."""
    return cache.content(row) if asked else digest_example(unasked(cache[row]))
