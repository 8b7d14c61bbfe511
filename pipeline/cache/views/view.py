"""A view: rows of finished caches read as one cache; nothing is copied.

    view.json -> open_view -> parts, each (cache, rows, overlays) -> CacheView, a TeacherCache
    cache or view -- list_parts --> parts -- select, or others beside them --> write_view

Parts are caches, never views: a view of a view speaks of the caches below. An overlay says more of
the same examples, row by row: signals, or targets at more temperatures.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.index.groups import count_before, join_runs, locate
from pipeline.cache.index.splits import RowRuns
from pipeline.cache.manifest import DRAFT, MANIFEST
from pipeline.cache.reader import TeacherCache
from pipeline.cache.views.file import (
    OverlaySource,
    PartSource,
    ViewFile,
    is_view,
    read_view_file,
    relate,
    require_few_sources,
    write_runs,
    write_view_file,
)
from pipeline.cache.views.manifest import describe_view
from pipeline.cache.views.opening import open_parts
from pipeline.cache.views.parts import Part, Taken, all_rows
from pipeline.errors import CacheError
from pipeline.examples import CachedExample
from pipeline.heads import OutputHead
from pipeline.runs import require_no_run


class CacheView(TeacherCache):
    """Parts of several caches, read-only, with everything that a cache does.

    Attributes:
        parts: end to end.
        manifest: of a cache that would hold the same. Its counts beside `examples` are estimates
            where rows of a cache are left out: that cache's, by the share of rows.
    """

    def __init__(self, path: Path, parts: Sequence[Part], digest: str) -> None:
        super().__init__(path, describe_view(path, [part.see() for part in parts], digest))
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part.rows) for part in parts))
        self._starts = [0, *self._ends[:-1]]

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the teacher's tokenizer."""
        return self.parts[0].cache.tokenizer_path

    def read_head(self) -> OutputHead:
        """See `TeacherCache.read_head`."""
        for source in self.parts[0].cache, *(o.cache for o in self.parts[0].overlays):
            if source.manifest.head == self.manifest.head is not None:
                return source.read_head()
        return super().read_head()

    def __getitem__(self, row: int) -> CachedExample:
        """See `TeacherCache`."""
        at = self._count_up(row)
        number = bisect_right(self._ends, at)
        return self.parts[number].read(at - self._starts[number])

    @property
    def is_remote(self) -> bool:
        """See `TeacherCache`."""
        return any(taken.cache.is_remote for part in self.parts for taken in part.taken)

    def read_ahead(self, rows: np.ndarray) -> None:
        """See `TeacherCache`."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers).tolist():
            part, start = self.parts[number], self._starts[number]
            places = rows[numbers == number] - start
            for taken in part.taken:
                taken.cache.read_ahead(taken.rows[places])

    @cached_property
    def contents(self) -> np.ndarray:
        """See `TeacherCache.contents`."""
        return np.concatenate([part.cache.contents[part.rows[:]] for part in self.parts])

    @cached_property
    def skipped(self) -> dict[str, str]:
        """See `TeacherCache.skipped`; of the rows taken alone."""
        return {
            example_id: why
            for part in self.parts
            for example_id, why in part.cache.skipped.items()
            if part.find(example_id) is not None
        }

    def find_row(self, example_id: str) -> int | None:
        for part, start in zip(self.parts, self._starts, strict=True):
            place = part.find(example_id)
            if place is not None:
                return start + place
        return None

    def _column(self, name: str) -> Iterator[Any]:
        for part in self.parts:
            first = 0
            for array in part.cache._column(name):
                edges = np.array([first, first + len(array)])
                places = slice(*count_before(part.rows, edges).tolist())
                if places.stop > places.start:
                    yield array.take(part.rows[places] - first)
                first += len(array)

    def _read_groups(self, column: str) -> dict[str, RowRuns] | None:
        found = [part.cache._read_groups(column) for part in self.parts]
        known = [groups for groups in found if groups is not None]
        if len(known) < len(found):
            return None
        names = sorted({name for groups in known for name in groups})
        joined = {name: self._join([groups.get(name) for groups in known]) for name in names}
        return {name: rows for name, rows in joined.items() if len(rows)}

    def _find_split(self, split: str) -> RowRuns:
        return self._join([part.cache._find_split(split) for part in self.parts])

    def _list_splits(self) -> list[str]:
        names = dict.fromkeys(n for part in self.parts for n in part.cache._list_splits())
        return [name for name in names if len(self._find_split(name))]

    def _join(self, found: Sequence[RowRuns | None]) -> RowRuns:
        """The view's rows among those found in the cache of each part."""
        places, starts = [], []
        for part, rows, start in zip(self.parts, found, self._starts, strict=True):
            if rows is not None and len(rows):
                places.append(locate(rows, part.rows))
                starts.append(start)
        return join_runs(places, starts)


def list_parts(cache: TeacherCache) -> tuple[Part, ...]:
    """The parts of a view; a cache is one."""
    return cache.parts if isinstance(cache, CacheView) else (Part(cache, all_rows(cache)),)


def list_sources(cache: TeacherCache) -> list[Taken]:
    """The caches whose files are read, overlays too, with the rows taken; a cache is one."""
    return [taken for part in list_parts(cache) for taken in part.taken]


def hash_rows(cache: TeacherCache) -> np.ndarray:
    """[n] uint64, the hash of each row's example id."""
    return np.concatenate(
        [part.cache._ids.read_hashes(len(part.cache))[part.rows[:]] for part in list_parts(cache)]
    )


def select_rows(cache: TeacherCache, rows: RowRuns) -> list[Part]:
    """Some rows, ascending, of a cache or view, as parts; those that would be empty are left
    out."""
    chosen, start = [], 0
    for part in list_parts(cache):
        mine = RowRuns(np.array([start]), np.array([len(part.rows)]))
        places = locate(rows, mine)
        if len(places):
            chosen.append(part.select(places))
        start += len(part.rows)
    return chosen


def open_view(path: Path) -> CacheView:
    """Open a view and the caches that it speaks of; see `TeacherCache.open`.

    Raises:
        CacheError: it is damaged, or a cache is missing.
        MismatchError: a cache is not the one that the view was made of.
    """
    view = read_view_file(path)
    return CacheView(path, open_parts(path, view), view.digest)


def require_room(path: Path) -> None:
    """Refuse a folder in which no view can stand.

    Raises:
        CacheError: a cache or a run stands there.
    """
    for name in (MANIFEST, DRAFT):
        if (path / name).is_file():
            raise CacheError(f"{path}: holds a cache ({name}); give the view another folder")
    require_no_run(path)


def write_view(path: Path, parts: Sequence[Part]) -> CacheView:
    """Write a view, its view.json last; one that stands already and is the same is kept.

    Raises:
        CacheError: something else stands there.
        MismatchError: the parts are not of one kind.
    """
    describe_view(path, [part.see() for part in parts], "")
    require_room(path)
    try:
        require_few_sources(sum(len(part.taken) for part in parts))
    except ValueError as error:
        raise CacheError(f"{path}: {error}; cache again what belongs together") from error
    entries = [
        PartSource(
            **_describe(path, part),
            overlays=[
                OverlaySource(**_describe(path, o), targets=o.targets) for o in part.overlays
            ],
        )
        for part in parts
    ]
    view = ViewFile(parts=entries)
    if not is_view(path):
        write_view_file(path, view)
    elif read_view_file(path).digest != view.digest:
        raise CacheError(f"{path}: holds another view; give this one another folder")
    return open_view(path)


def _describe(path: Path, taken: Taken) -> dict[str, Any]:
    whole = len(taken.rows) == len(taken.cache)
    return {
        "path": relate(taken.cache.path, path),
        "digest": taken.cache.manifest.digest,
        "rows": None if whole else write_runs(path, taken.rows),
    }
