"""The caches that a view names, opened: whoever made it may have named any folder, or a store.

view.json -> folder -> manifest.json, its digest -> links -> Part, Overlay -- rows apart? --> parts
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.cache.index.splits import RowRuns
from pipeline.cache.manifest import MANIFEST, read_manifest
from pipeline.cache.names import require_inside, require_own
from pipeline.cache.reader import TeacherCache
from pipeline.cache.views.file import Source, ViewFile, find_cache, read_runs
from pipeline.cache.views.parts import Overlay, Part, all_rows
from pipeline.errors import CacheError, MismatchError


def open_parts(path: Path, view: ViewFile) -> list[Part]:
    """Open what a view is made of, each cache once.

    Args:
        path: the view's folder.

    Raises:
        CacheError: a cache is missing or damaged, or rows are not its own.
        MismatchError: a cache is not the one that the view was made of.
    """
    sources = [source for part in view.parts for source in (part, *part.overlays)]
    require_own(path)
    folders = {source.path: find_cache(path, source.path) for source in sources}
    caches: dict[str, TeacherCache] = {}
    for source in sources:
        if source.path not in caches:
            caches[source.path] = _open_cache(path, source, folders)
    take = partial(_take, path, caches)
    parts = []
    for part in view.parts:
        overlays = tuple(Overlay(*take(o), targets=o.targets) for o in part.overlays)
        parts.append(Part(*take(part), overlays))
        for overlay in overlays:
            if len(overlay.rows) != len(parts[-1].rows):
                raise CacheError(
                    f"{path}: lays {len(overlay.rows):,} rows of {overlay.cache.path} over"
                    f" {len(parts[-1].rows):,} of {parts[-1].cache.path}; make the view again"
                )
    _require_apart(path, parts)
    return parts


def _open_cache(path: Path, source: Source, folders: Mapping[str, Path]) -> TeacherCache:
    """A cache that a view names, which may be any folder: it is not looked through before it is
    known to be the one."""
    folder = folders[source.path]
    require_inside(folder, [folder / MANIFEST])
    try:
        cache = TeacherCache(folder, read_manifest(folder), len(folders))
    except CacheError as error:
        if folder.exists():
            raise
        raise CacheError(
            f"{path}: sees {folder}, which is not there; bring it back, or make the view again"
        ) from error
    _require_digest(path, source, cache)
    require_own(folder)
    return cache


def _require_digest(path: Path, source: Source, cache: TeacherCache) -> None:
    if cache.manifest.digest != source.digest:
        raise MismatchError(
            f"{path}: is a view of another cache than stands in {cache.path} now (manifest"
            f" {cache.manifest.digest[:8]}…, expected {source.digest[:8]}…); put that one back, or"
            " make the view again"
        )


def _require_apart(path: Path, parts: Sequence[Part]) -> None:
    """Refuse parts that take a row of one cache twice."""
    taken: dict[str, list[RowRuns]] = {}
    for part in parts:
        taken.setdefault(str(part.cache.path), []).append(part.rows)
    for runs in taken.values():
        starts = np.concatenate([rows.starts for rows in runs])
        ends = starts + np.concatenate([rows.counts for rows in runs])
        order = np.argsort(starts, kind="stable")
        if (starts[order][1:] < ends[order][:-1]).any():
            raise CacheError(f"{path}: takes a row of one cache twice; make the view again")


def _take(
    path: Path, caches: dict[str, TeacherCache], source: Source
) -> tuple[TeacherCache, RowRuns]:
    cache = caches[source.path]
    _require_digest(path, source, cache)
    rows = all_rows(cache) if source.rows is None else read_runs(path, source.rows, len(cache))
    return cache, rows
