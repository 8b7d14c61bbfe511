"""What a codec is: entries of N targets in, flat columns out, and back.

    Entries -- codec.encode --> [N, width] columns -- zstd by Arrow --> rows.arrow

A codec is its own configuration, lies in the manifest, and works on all the targets of a record
batch at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from pipeline.cache.codecs.ranking import Ranking
from pipeline.config import StrictModel

MAX_CLASSES = 2**20
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Entries:
    """All that is kept of N distributions.

    Attributes:
        ids: [N, K] int64, int32 once decoded, distinct within a row, in any order.
        logits: [N, K] float32, finite.
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
class Layout:
    """What a codec needs to know: V classes, K kept, R drawn; by the shard, their numbering."""

    num_classes: int
    top_k: int
    tail_draws: int
    temperatures: tuple[float, ...] = (1.0,)
    ranking: Ranking | None = field(default=None, compare=False)


class Codec(StrictModel, ABC):
    """A member of the family: `encode` and `decode` are inverse up to the promised error."""

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
    def decode(self, columns: Mapping[str, np.ndarray], layout: Layout) -> Entries:
        """Return fresh arrays, ids ascending by rank within each row."""
