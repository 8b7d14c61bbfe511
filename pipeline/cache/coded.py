"""Targets as the file has them, decoded for a whole batch at once, on any device.

    record batch -- rows --> CodedTargets of an example -- cat --> of a training batch
        -- to(device): codec.decode, Ranking.find --> Targets

Codes are a third of what they become, so a device may be sent them in its place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import Codec, Decoded, Layout, Ranking
from pipeline.cache.codecs.workspace import take_scratch
from pipeline.errors import CacheError
from pipeline.targets import Targets

LABEL = "label_id"
_CHUNK = 2**19  # entries decoded at a time, which bounds the memory that it takes
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one shard, in columns that must not be written to.

    Attributes:
        columns: what the codec made of the targets of a record batch, [N, values per target] each,
            and `label_id` [N, 1] int32.
        start, stop: the rows that are meant.
        ranking: the shard's.
        padded: whether a logit may be -inf.
        owner: says whose they are.
    """

    columns: Mapping[str, np.ndarray]
    start: int
    stop: int
    ranking: Ranking
    padded: bool
    owner: Callable[[], str]


@dataclass(frozen=True, eq=False)
class CodedTargets:
    """N targets of one cache, not decoded.

    Attributes:
        parts: where they are, end to end.
        codec, layout: of the cache.
    """

    parts: Sequence[Rows]
    codec: Codec
    layout: Layout

    def __len__(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    @property
    def num_classes(self) -> int:
        """V."""
        return self.layout.num_classes

    @staticmethod
    def cat(targets: Sequence["CodedTargets"]) -> "CodedTargets":
        """Join positions of several examples of one cache; nothing is copied."""
        return replace(targets[0], parts=[part for one in targets for part in one.parts])

    @property
    def _padded(self) -> bool:
        return any(part.padded for part in self.parts)

    def join(self) -> "JoinedTargets":
        """Copy them, so that they keep no record batch alive and can be moved to a device.

        Raises:
            CacheError: NaN or infinity among them.
        """
        columns = {
            name: np.concatenate([c[p.start : p.stop] for p, c in pairs])
            for name, pairs in self._pair_columns()
        }
        if self.codec.has_invalid(columns, self._padded):
            self._refuse_invalid()
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return JoinedTargets(tensors, self._runs(), self.codec, self.layout)

    def to(self, device: torch.device | str) -> Targets:
        """Decode on a device; fresh tensors each time.

        Raises:
            CacheError: NaN or infinity among them.
        """
        if torch.device(device) != _CPU:
            return self.join().to(device)
        out = Decoded.empty(len(self), self.layout)
        labels = np.empty(len(self), dtype=np.int64)
        start = 0
        for chunk in self._cut():
            columns, rows = chunk._join_for_now(), slice(start, start + len(chunk))
            into = out if len(chunk) == len(self) else out.select(rows)
            find = partial(_find_ids, chunk._runs())
            self.codec.decode(columns, self.layout, find, into)
            # Looked at while it is near the processor.
            if self.codec.exact and not into.is_finite(self._padded):
                chunk._refuse_invalid()
            labels[rows] = columns[LABEL][:, 0]
            start = rows.stop
        return Targets(
            **{name: torch.from_numpy(array) for name, array in vars(out).items()},
            label_ids=torch.from_numpy(labels),
            temperatures=self.layout.temperatures,
            num_classes=self.layout.num_classes,
        )

    def _cut(self) -> Iterator["CodedTargets"]:
        """Chunks of few entries: parts of a large example, or several small ones."""
        limit = max(1, _CHUNK // (self.layout.top_k + self.layout.tail_draws))
        waiting: list[Rows] = []
        total = 0
        for part in self.parts:
            for start in range(part.start, part.stop, limit):
                stop = min(start + limit, part.stop)
                if waiting and total + stop - start > limit:
                    yield replace(self, parts=waiting)
                    waiting, total = [], 0
                waiting.append(replace(part, start=start, stop=stop))
                total += stop - start
        if waiting:
            yield replace(self, parts=waiting)

    def _join_for_now(self) -> dict[str, np.ndarray]:
        """Columns end to end, in memory that the next call in this thread writes to."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return {name: c[part.start : part.stop] for name, c in part.columns.items()}
        columns, count = {}, len(self)
        for name, pairs in self._pair_columns():
            first = pairs[0][1]
            columns[name] = take_scratch(name, (count, first.shape[1]), first.dtype)
            np.concatenate([c[p.start : p.stop] for p, c in pairs], out=columns[name])
        return columns

    def _refuse_invalid(self) -> None:
        for part in self.parts:
            own = {name: column[part.start : part.stop] for name, column in part.columns.items()}
            if self.codec.has_invalid(own, part.padded):
                raise CacheError(
                    f"{part.owner()} has targets that are NaN or infinite; the shard is damaged,"
                    " copy or cache it again"
                )

    def _pair_columns(self) -> Iterator[tuple[str, list[tuple[Rows, np.ndarray]]]]:
        for name in self.parts[0].columns:
            yield name, [(part, part.columns[name]) for part in self.parts]

    def _runs(self) -> list[tuple[Ranking, int]]:
        grouped = groupby(self.parts, key=lambda part: id(part.ranking))
        runs = (list(group) for _, group in grouped)
        return [(run[0].ranking, sum(part.stop - part.start for part in run)) for run in runs]


@dataclass(frozen=True, eq=False)
class JoinedTargets:
    """N targets in codes, as tensors of one device.

    Attributes:
        columns: see `Rows`.
        runs: the shards' rankings, each with the number of targets that it numbers, end to end.
        codec, layout: of the cache.
    """

    columns: Mapping[str, Tensor]
    runs: Sequence[tuple[Ranking, int]]
    codec: Codec
    layout: Layout

    def __len__(self) -> int:
        return len(self.columns[LABEL])

    @property
    def num_classes(self) -> int:
        """V."""
        return self.layout.num_classes

    @property
    def nbytes(self) -> int:
        """What is copied when they are moved."""
        return sum(column.nbytes for column in self.columns.values())

    def pin_memory(self) -> "JoinedTargets":
        """A copy that a device reads while the processor goes on; torch's loader asks for it."""
        return replace(self, columns={n: c.pin_memory() for n, c in self.columns.items()})

    def to(self, device: torch.device | str) -> Targets:
        """Decode on a device, to which the codes alone are copied; fresh tensors each time."""
        columns = {n: c.to(device, non_blocking=True) for n, c in self.columns.items()}
        labels = columns[LABEL][:, 0]
        out = Decoded.empty(len(self), self.layout, labels.device)
        self.codec.decode(columns, self.layout, partial(_find_ids, self.runs), out)
        return Targets(
            **vars(out),
            label_ids=labels.to(torch.int64),
            temperatures=self.layout.temperatures,
            num_classes=self.layout.num_classes,
        )


def _find_ids(runs: Sequence[tuple[Ranking, int]], ranks: Any, out: Any) -> None:
    start = 0
    for ranking, count in runs:
        rows = slice(start, start + count)
        ranking.find(ranks[rows], out[rows])
        start += count
