"""Another layer or temperature for a cache that stands: one pass over its own examples.

cache -> its examples, as it holds them -> the teacher of its config.yaml -> OUT/added
    -> OUT/view.json, which lays that over the cache, written last
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from pipeline.cache import (
    CacheView,
    Draft,
    Overlay,
    RowRuns,
    TeacherCache,
    list_parts,
    require_overlaid,
    require_room,
    require_same,
    write_view,
)
from pipeline.config import load_config
from pipeline.errors import ConfigError, MismatchError
from pipeline.examples import Example
from pipeline.sources import Rows
from stages.cache_teacher import CacheConfig, Growth, cache_teacher
from stages.naming import require_asked
from stages.progress import RowProgress

_ADDED = "added"
_NOTHING = ("hidden.layers=[]", "hidden.qkv=[]", "hidden.head=false", "hidden.pooled=false")
_FEWEST = ("targets.top_k=1", "targets.tail_draws=0", "targets.temperatures=[1]")
_TEMPERATURES = "targets.temperatures"
_RUN = ("hidden", "teacher", "batch", "shard")  # what may be set of the cache's config beside them
_ROUNDING = 0.5  # nats between two first choices that other batches may swap


@dataclass(frozen=True)
class _Told(Rows):
    """What a cache tells of its data, which is not read again."""

    told: Mapping[str, Any]
    names: list[str] | None

    @classmethod
    def of(cls, cache: TeacherCache) -> "_Told":
        """What the manifest says."""
        data = dict(cache.manifest.identity.data)
        told = {"digest": data.pop("digest")}
        return cls((), None, None, None, data, told, cache.manifest.label_names)

    @property
    def label_names(self) -> list[str] | None:
        """See `Rows`."""
        return self.names

    @property
    def digest(self) -> str:
        """See `Rows`."""
        return str(self.told["digest"])


def add_signal(
    cache_path: Path, output: Path, asked: Sequence[str], progress: bool = True
) -> CacheView:
    """Ask the teacher of a cache for more about its examples and open the view of both.

    Args:
        asked: `hidden.layers=[4]`, `targets.temperatures=[1,4]` and what else of `hidden` is to be
            added; `teacher`, `batch` and `shard` may be set too.

    Raises:
        MismatchError: the teacher is another now, or says other things of the same tokens.
        StillroomError: nothing to add, or what the capture found wrong.
    """
    cache, console = TeacherCache.open(cache_path), Console(quiet=not progress)
    require_room(output)
    hotter = any(text.partition("=")[0] == _TEMPERATURES for text in asked)
    config = _make_config(cache, asked, hotter)
    config = config.model_copy(update={"output": output / _ADDED})
    growth = Growth(
        lambda _: _read_examples(cache),
        partial(_check, cache, hotter),
        _Told.of(cache),
        cache.skipped,
        whole=False,
    )
    added = TeacherCache.open(cache_teacher(config, progress, growth))
    with RowProgress(console, "comparing", len(cache)) as bar:
        _require_same_choices(cache, added, bar)
    parts, start = [], 0
    for part in list_parts(cache):
        rows = RowRuns(np.array([start]), np.array([len(part.rows)]))
        overlay = Overlay(added, rows, targets=hotter)
        parts.append(replace(part, overlays=(*part.overlays, overlay)))
        start += len(part.rows)
    view = write_view(output, parts)
    before, now = (set(one.manifest.targets.temperatures) for one in (cache, view))
    more = [*added.manifest.signals, *(f"T = {t:g}" for t in sorted(now - before))]
    console.print(f"{output}: {cache_path} with {', '.join(more)}", soft_wrap=True)
    return view


def _make_config(cache: TeacherCache, asked: Sequence[str], hotter: bool) -> CacheConfig:
    """The cache's own config with what is asked for in place of what it has.

    Raises:
        ConfigError: there is none, or a setting that decides more than what is added.
    """
    require_asked(cache)
    file = list_parts(cache)[0].cache.path / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: is missing, so nobody knows who the teacher was; put it back")
    for text in asked:
        key = text.partition("=")[0]
        if key != _TEMPERATURES and key.partition(".")[0] not in _RUN:
            raise ConfigError(
                f"--set {text}: cannot be added to a cache; set hidden.* or {_TEMPERATURES}"
            )
    # It came with the cache: whose code is run is for whoever runs it to say.
    own = (
        "teacher.trust_remote_code=false",
        "on_error=stop",
        *_NOTHING,
        *(() if hotter else _FEWEST),
    )
    config = load_config(CacheConfig, file, [*own, *asked])
    hidden = config.hidden
    if not (hotter or hidden.layers or hidden.qkv or hidden.head or hidden.pooled):
        raise ConfigError(
            f"nothing is added to {cache.path}; say what with --set hidden.layers=[4] or"
            f" --set {_TEMPERATURES}=[1,4]"
        )
    if not hotter:
        return config
    known = cache.manifest.targets.temperatures
    if not set(config.targets.temperatures) - set(known):
        held = ", ".join(f"{temperature:g}" for temperature in known)
        raise ConfigError(f"{cache.path}: holds T = {held} already; add another temperature")
    every = (*known, *config.targets.temperatures)
    kept = config.targets.model_copy(update={"temperatures": tuple(sorted(set(every)))})
    return config.model_copy(update={"targets": kept})


def _read_examples(cache: TeacherCache) -> Iterator[Example]:
    """The examples as the teacher read them; what is carried stays in the cache."""
    names = [field.name for field in fields(Example) if field.name != "columns"]
    for row in range(len(cache)):
        example = cache[row]
        yield Example(**{name: getattr(example, name) for name in names})


def _check(cache: TeacherCache, hotter: bool, draft: Draft) -> None:
    manifest = cache.manifest
    require_overlaid(cache.path, manifest, draft)
    if twice := sorted(set(draft.signals) & set(manifest.signals)):
        raise ConfigError(f"{cache.path}: holds {', '.join(twice)} already; leave it out")
    if hotter:
        left = {"temperatures", "compression"}
        old, new = (d.targets.model_dump(mode="json", exclude=left) for d in (manifest, draft))
        remedy = "The new targets take the place of the old; only temperatures can be added"
        require_same(cache.path, {"targets": old}, {"targets": new}, remedy)


def _require_same_choices(cache: TeacherCache, added: TeacherCache, bar: RowProgress) -> None:
    """Compare the teacher's first choice at every target with the one that it had before.

    Raises:
        MismatchError: it is another by more than rounding.
    """
    if cache.manifest.layout.top_k == 0 or cache.manifest.num_classes == 1:
        return
    for row in range(len(cache)):
        before, now = cache[row].targets, added[row].targets
        choice, _ = now.first_choice()
        kept = torch.where(before.ids == choice[:, None], before.logits, -torch.inf)
        off = before.logits.amax(dim=1) - kept.amax(dim=1) > _ROUNDING
        if off.any():
            raise MismatchError(
                f"{cache.path}: example {added[row].example_id!r}: the teacher has another first"
                f" choice than when it was cached, at {int(off.sum())} of {len(off)} targets; cache"
                " again with the libraries of today"
            )
        bar.advance(row + 1)
