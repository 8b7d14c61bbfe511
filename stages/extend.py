"""More examples for a cache that stands: only what it does not hold is asked of the teacher.

cache, config of the larger data -> examples that are new -> OUT/added, an ordinary cache
    -> OUT/view.json over both, written last
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.cache import (
    CacheView,
    Draft,
    RowRuns,
    TeacherCache,
    copy_bases,
    has_bases,
    hash_rows,
    list_parts,
    list_sources,
    require_fits,
    require_room,
    require_same,
    select_rows,
    write_view,
)
from pipeline.cache.gaps import unasked
from pipeline.errors import ConfigError, MismatchError, StillroomError
from pipeline.examples import Example
from pipeline.identity import digest_example
from pipeline.sources import Rows, load_rows
from pipeline.storage import remove_tree
from pipeline.teacher import load_settings, load_tokenizer
from stages.cache_teacher import CacheConfig, Growth, cache_teacher
from stages.quiet import quiet_libraries
from stages.writing import lets_write

_ADDED = "added"
_ALONE = (
    "rows packed into blocks extend a cache where the config has the new rows alone, with ids of"
    " their own"
)


class _NothingNewError(StillroomError):
    """The cache holds all examples of the data."""


@quiet_libraries()
def extend(
    cache_path: Path,
    config: CacheConfig,
    output: Path,
    replace: bool = False,
    progress: bool = True,
) -> CacheView:
    """Ask the teacher about what a cache does not hold and open the view of both; a view of the
    cache alone where there is nothing new.

    Args:
        config: that of the cache, with more data; its `output` is not used.
        replace: whether an example whose content changed takes the place of the cached one.

    Raises:
        ConfigError: a teacher that writes what it is asked about, or blocks to be replaced.
        MismatchError: another teacher, tokenizer, task or other settings than the cache's.
        StillroomError: what the capture found wrong, or an id with other content than cached.
    """
    cache, console = TeacherCache.open(cache_path), Console(quiet=not progress)
    require_room(output)
    _require_task(cache, config)
    if lets_write(config.task, config.data):
        raise ConfigError(
            "extend: here the teacher writes what it is asked about, for every row; cache the new"
            " rows by themselves and join the two with `stillroom merge`"
        )
    packed = bool(getattr(config.task, "packing", False))
    if packed and replace:
        raise ConfigError(
            "extend: --replace takes one example for another, but a packed one is a block of"
            " several rows; leave it out, or cache the changed data into another output"
        )
    added = output / _ADDED
    prepare = partial(_prepare, cache, _find_bases(cache), added)
    rows = load_rows(config.data) if packed else None
    growth = Growth(partial(_leave_out, cache, replace, rows), prepare, rows)
    try:
        cache_teacher(config.model_copy(update={"output": added}), progress, growth)
    except _NothingNewError:
        remove_tree(added)
        view = write_view(output, list_parts(cache))
        console.print(
            f"{output}: a view of {cache_path}, which holds all examples of the data already;"
            f" nothing is new{_tell_gaps(view)}",
            soft_wrap=True,
        )
        return view
    (added / "manifest.json").stat()  # it stood a moment ago: the disk is to blame if it is gone
    view, replaced = _join(cache, TeacherCache.open(added), output, replace)
    told = f", {replaced:,} of them in place of others" if replaced else ""
    console.print(
        f"{output}: a view of {len(view):,} examples, {len(view) + replaced - len(cache):,} new"
        f" beside {cache_path}{told}{_tell_gaps(view)}",
        soft_wrap=True,
    )
    return view


def _require_task(cache: TeacherCache, config: CacheConfig) -> None:
    """Compare what the config says of the task itself before its data are read.

    Raises:
        MismatchError: names the settings that differ.
    """
    task = config.task.complete(load_settings(config.teacher), load_tokenizer(config.teacher))
    said = task.model_dump(mode="json", exclude_unset=True)
    plain = {name: value for name, value in said.items() if isinstance(value, str | int | float)}
    known = {name: cache.manifest.task.get(name) for name in plain}
    remedy = "Extend it by more data of the same task, or make a cache of its own"
    require_same(cache.path, {"task": known}, {"task": plain}, remedy)


def _find_bases(cache: TeacherCache) -> Path | None:
    """Whose bases project the vectors of a cache; None where they are kept as they are.

    Raises:
        ConfigError: several caches' do.
    """
    if cache.manifest.projections is None:
        return None
    found = [s.cache for s in list_sources(cache) if s.cache.manifest.projections is not None]
    if len({source.manifest.projections for source in found}) > 1:
        raise ConfigError(
            f"{cache.path}: its hidden states are projected by several bases, by which no one"
            " capture can project more; extend the cache below the view first, then add the signals"
        )
    return found[0].path


def _prepare(cache: TeacherCache, bases: Path | None, added: Path, draft: Draft) -> None:
    """Check that a capture fits, and let it project as the cache does, not by bases of its own.

    While it holds the folder's lock: had the folder vanished before, with the bases, nobody knew.
    """
    require_fits(cache.path, cache.manifest, draft)
    if bases is not None and not has_bases(added):
        copy_bases(bases, added)


def _leave_out(
    cache: TeacherCache, replace: bool, packed: Rows | None, examples: Iterable[Example]
) -> Iterator[Example]:
    """Those that the cache does not hold; what the teacher could not answer is not asked again.

    Args:
        packed: the rows of which the examples are blocks; None where each is of one row.

    Raises:
        MismatchError: an id that it holds with other content, unless that is to be replaced; rows
            that it holds in other blocks.
    """
    new, held = False, 0
    for example in examples:
        row = cache.find_row(example.example_id)
        if row is not None:
            asked = unasked(example) if example.example_id in cache.skipped else example
            if cache.content(row) == digest_example(asked):
                held += 1
                continue
            if not replace:
                raise _other_content(cache, example.example_id, packed is not None)
        new = True
        yield example
    if new and packed is not None and held < len(cache) and (name := _find_shared(cache, packed)):
        raise MismatchError(
            f"{cache.path}: holds row {name!r} of the data in a block with other rows, and it would"
            f" be asked about twice; {_ALONE}"
        )
    if not new:
        raise _NothingNewError(f"{cache.path}: holds all examples already")


def _find_shared(cache: TeacherCache, rows: Rows) -> str | None:
    """A row of the data with which a block of the cache begins; None where there is none."""
    names = {str(row["id"]) for row in rows}
    first = (block.rpartition("@")[0] for block in cache.ids())
    return next((name for name in first if name in names), None)


def _join(
    cache: TeacherCache, added: TeacherCache, output: Path, replace: bool
) -> tuple[CacheView, int]:
    """The view of both, and how many examples of the first one it does without."""
    kept = np.ones(len(cache), dtype=bool)
    for row in np.flatnonzero(np.isin(hash_rows(cache), hash_rows(added))).tolist():
        example_id = cache[row].example_id
        if example_id in added:
            if not replace:
                raise _other_content(cache, example_id, False)
            kept[row] = False
    parts = [*select_rows(cache, RowRuns.of(np.flatnonzero(kept))), *list_parts(added)]
    return write_view(output, parts), int((~kept).sum())


def _tell_gaps(view: CacheView) -> str:
    count = len(view.skipped)
    return f"; {count:,} without an answer, which the teacher is not asked again" if count else ""


def _other_content(cache: TeacherCache, example_id: str, packed: bool) -> MismatchError:
    remedy = (
        "go back to the settings that it was cached with, give the example another id, or take the"
        " new one in its place with --replace"
    )
    if packed:  # what a block holds depends on the rows beside it
        remedy = _ALONE
    return MismatchError(
        f"{cache.path}: holds example {example_id!r} with other content than the data; {remedy}"
    )
