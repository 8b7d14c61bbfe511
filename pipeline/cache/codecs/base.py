"""What a codec is: entries of N targets in, flat columns out, and back.

    Entries -- codec.encode --> [N, width] columns -- zstd by Arrow --> rows.arrow
    columns -- codec.decode, on any device --> Decoded

A codec is its own configuration, lies in the manifest, and works on many targets at once: it writes
all those of a record batch, and reads all those of a training batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, Self

import numpy as np
import torch

from pipeline.cache.codecs.ranking import Ranking
from pipeline.cache.codecs.workspace import take_arrays
from pipeline.config import StrictModel

MAX_CLASSES = 2**20
Columns = dict[str, np.ndarray]
Array = Any  # of numpy, on the CPU, or a tensor of a device
Find = Callable[[Array, Array], None]  # ranks to ids, both int32: `Ranking.find`


@dataclass(frozen=True)
class Entries:
    """All that is kept of N distributions.

    Attributes:
        ids: [N, K] int64, distinct within a row, in any order.
        logits: [N, K] float32, finite; -inf where a target holds fewer than K, see `Codec.short`.
        draw_ids: [N, R] like ids, in any order, may repeat.
        draw_logits: [N, R] float32, finite.
        logsumexp: [N, temperatures] float32, over all V classes, on the scale of the logits.
        label_log_probs: [N] float32, at temperature 1.
    """

    ids: np.ndarray
    logits: np.ndarray
    draw_ids: np.ndarray
    draw_logits: np.ndarray
    logsumexp: np.ndarray
    label_log_probs: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """`Entries` as they are read, contiguous; ids are int32."""

    ids: Array
    logits: Array
    draw_ids: Array
    draw_logits: Array
    logsumexp: Array
    label_log_probs: Array

    @classmethod
    def empty(cls, count: int, layout: "Layout", device: torch.device | None = None) -> "Decoded":
        """For N targets, to be filled: arrays, or tensors of a device."""
        kept, drawn = (count, layout.top_k), (count, layout.tail_draws)
        shapes = [kept, kept, drawn, drawn, (count, len(layout.temperatures)), (count,)]
        kinds = ["int32", "float32", "int32", "float32", "float32", "float32"]
        if device is None:
            return cls(*take_arrays(shapes, kinds))
        types = [getattr(torch, kind) for kind in kinds]
        pairs = zip(shapes, types, strict=True)
        return cls(*(torch.empty(shape, dtype=kind, device=device) for shape, kind in pairs))

    def is_finite(self, padded: bool) -> bool:
        """Whether all are numbers, of arrays; `padded`: or a logit is -inf."""
        whole = all(map(are_finite, (self.draw_logits, self.logsumexp, self.label_log_probs)))
        return whole and (are_finite(self.logits) or (padded and bool(self.logits.max() < np.inf)))

    def select(self, rows: slice) -> "Decoded":
        """Views of some targets."""
        return Decoded(**{name: array[rows] for name, array in vars(self).items()})


@dataclass(frozen=True)
class Layout:
    """What a codec needs to know: V classes, K kept, R drawn; by the shard, their numbering."""

    num_classes: int
    top_k: int
    tail_draws: int
    temperatures: tuple[float, ...] = (1.0,)
    ranking: Ranking | None = field(default=None, compare=False)


class Codec(StrictModel, ABC):
    """A member of the family: `encode` and `decode` are inverse up to the promised error."""

    # Whether a target may hold fewer than K entries: others have a logit of -inf and mean nothing.
    short: ClassVar[bool] = False

    # Whether the bits of numbers are kept as they are, which may be none.
    exact: ClassVar[bool] = False

    name: str

    def resolve(self, top_k: int) -> Self:
        """Put numbers in place of defaults that depend on K, as the manifest keeps them."""
        return self

    @abstractmethod
    def columns(self, layout: Layout) -> dict[str, tuple[str, int]]:
        """Column name -> (numpy dtype, values per target), in the order of the file."""

    @abstractmethod
    def encode(self, entries: Entries, layout: Layout) -> Columns:
        """Return one [N, values per target] array for each of `columns(layout)`."""

    @abstractmethod
    def decode(
        self, columns: Mapping[str, Array], layout: Layout, find: Find, out: Decoded
    ) -> None:
        """Fill `out`, ids ascending by rank within each row.

        Args:
            columns: contiguous, [N, values per target] each: arrays, or tensors of a device, as
                `out` is.
            find: the numbering, in place of the layout's.
        """

    def has_invalid(self, columns: Mapping[str, np.ndarray], padded: bool) -> bool:
        """Whether codes stand for NaN or infinity, as those of an `exact` codec can.

        Args:
            columns: see `decode`.
            padded: whether a logit may be -inf, see `Entries`.
        """
        return False


def are_finite(values: np.ndarray) -> bool:
    """Whether none is NaN or infinity."""
    flat = values.reshape(-1)
    # A sum of squares takes half as long as asking each number; one that overflows tells nothing.
    return isfinite(np.vdot(flat, flat)) or bool(np.isfinite(flat).all())
