"""What a view is made of: rows of caches, and what other caches say more of the same rows.

place -> row of the cache -> example -- Overlay.add_to --> example that knows more
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.cache.index.groups import compose, count_before
from pipeline.cache.index.splits import RowRuns
from pipeline.cache.reader import TeacherCache
from pipeline.cache.signals.hidden import LazySignals
from pipeline.cache.views.manifest import Seen
from pipeline.errors import MismatchError
from pipeline.examples import CachedExample


@dataclass(frozen=True)
class Taken:
    """Rows of a cache.

    Attributes:
        cache: no view.
        rows: ascending.
    """

    cache: TeacherCache
    rows: RowRuns

    @property
    def share(self) -> float:
        """Of the cache's rows."""
        return len(self.rows) / len(self.cache)


@dataclass(frozen=True)
class Overlay(Taken):
    """Rows that say more of those of a part, one for each, in the same order.

    Attributes:
        targets: whether their targets take the place of the part's.
    """

    targets: bool = False

    def add_to(self, example: CachedExample, place: int) -> CachedExample:
        """An example of the part with what is said here.

        Raises:
            MismatchError: the two are not of one example.
        """
        more = self.cache[self.rows[place]]
        if more.example_id != example.example_id or not _same_question(more, example):
            raise MismatchError(
                f"{self.cache.path}: row {self.rows[place]} is about other tokens than example"
                f" {example.example_id!r}, which it is laid over; make the view again"
            )
        fresh = set(more.hidden)
        hidden = LazySignals(
            {**dict.fromkeys(example.hidden), **dict.fromkeys(more.hidden)},
            lambda name: (more if name in fresh else example).hidden[name],
        )
        changes: dict[str, Any] = {"hidden": hidden}
        if self.targets:
            changes["coded"] = vars(more)["coded"]
        joined = object.__new__(type(example))  # a copy would decode the targets
        vars(joined).update(vars(example) | changes)
        return joined


@dataclass(frozen=True)
class Part(Taken):
    """Some rows of a view, of one cache.

    Attributes:
        overlays: a later one adds to the earlier.
    """

    overlays: tuple[Overlay, ...] = field(default=())

    @property
    def taken(self) -> tuple[Taken, ...]:
        """What is read for it: its own cache, then the overlays."""
        return (self, *self.overlays)

    def read(self, place: int) -> CachedExample:
        """The example at a place."""
        example = self.cache[self.rows[place]]
        for overlay in self.overlays:
            example = overlay.add_to(example, place)
        return example

    def find(self, example_id: str) -> int | None:
        """The place of an id; None where it is not taken."""
        row = self.cache.find_row(example_id)
        if row is None:
            return None
        before, after = count_before(self.rows, np.array([row, row + 1])).tolist()
        return int(before) if after > before else None

    def select(self, places: RowRuns) -> "Part":
        """The part with these of its rows alone."""
        overlays = tuple(
            Overlay(o.cache, compose(o.rows, places), o.targets) for o in self.overlays
        )
        return Part(self.cache, compose(self.rows, places), overlays)

    def see(self) -> Seen:
        """What its manifests say together."""
        over = [(overlay.cache.manifest, overlay.targets) for overlay in self.overlays]
        return Seen(self.cache.path, self.cache.manifest, over, self.share, len(self.rows))


def all_rows(cache: TeacherCache) -> RowRuns:
    """Every row."""
    return RowRuns(np.array([0]), np.array([len(cache)]))


def _same_question(one: CachedExample, other: CachedExample) -> bool:
    names = ("input_ids", "target_positions", "label_ids")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
