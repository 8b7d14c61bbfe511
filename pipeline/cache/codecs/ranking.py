"""Ids by how often a shard keeps them: frequent ones get small numbers, and so small gaps.

ids of the first record batch -- Ranking.learn --> frequent ids, in shard.json
rank r: the r-th frequent id, after them all other ids as they come
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SEEN = 2  # times an id was kept; one that was kept once says nothing about the next batch
LARGE = 2**14  # numbers from which on torch's loops save more than its calls cost over numpy's
_LETTERS = 8  # of a class in decimal, with a blank
_WORTH = 2**8  # classes; below, a gap is one byte and hardly gets smaller


@dataclass(frozen=True, eq=False)
class Ranking:
    """A numbering of V classes, for one shard.

    Attributes:
        frequent: ids by falling frequency, each once.
        num_classes: V.
    """

    frequent: np.ndarray
    num_classes: int

    @classmethod
    def learn(cls, ids: np.ndarray, num_classes: int) -> "Ranking":
        """Rank what occurs twice among [n] ids, the more frequent and then the smaller first."""
        if num_classes <= _WORTH:
            return cls(np.zeros(0, dtype=np.int32), num_classes)
        counts = np.bincount(ids, minlength=num_classes)
        order = np.argsort(-counts, kind="stable")
        return cls(order[: np.count_nonzero(counts >= _SEEN)].astype(np.int32), num_classes)

    @classmethod
    def parse(cls, text: str, num_classes: int) -> "Ranking":
        """Read what `str` wrote.

        Raises:
            ValueError: no numbers, or no such classes.
        """
        if len(text) > _LETTERS * num_classes:
            raise ValueError("frequent_ids holds more than every class once")
        try:
            frequent = np.array(text.split(), dtype=np.int32)
        except OverflowError as error:
            raise ValueError("frequent_ids holds a number of no class") from error
        known = not len(frequent) or 0 <= frequent.min() <= frequent.max() < num_classes
        if not known or len(np.unique(frequent)) != len(frequent):
            raise ValueError("frequent_ids holds something else than different classes")
        return cls(frequent, num_classes)

    def __str__(self) -> str:
        """The frequent ids in decimal, with spaces between them."""
        return " ".join(map(str, self.frequent.tolist()))

    def rank(self, ids: np.ndarray) -> np.ndarray:
        """The number of each id, int64."""
        return self._ranks.take(ids) if len(self.frequent) else ids

    def find(self, ranks: Any, out: Any) -> None:
        """The id of each number, both int32: arrays or tensors of a device.

        Ranks may be overwritten; those of no class are taken for the last.
        """
        last = self.num_classes - 1
        if not len(self.frequent):
            out[...] = ranks.clip(0, last)
        elif isinstance(ranks, np.ndarray) and ranks.size < LARGE:
            self._ids.take(ranks, mode="clip", out=out)
        else:
            numbers, found = torch.as_tensor(ranks).clamp_(0, last), torch.as_tensor(out)
            if numbers.device not in self._tables:
                self._tables[numbers.device] = torch.from_numpy(self._ids).to(numbers.device)
            table = self._tables[numbers.device]
            torch.index_select(table, 0, numbers.view(-1), out=found.view(-1))

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _ids(self) -> np.ndarray:
        others = np.ones(self.num_classes, dtype=bool)
        others[self.frequent] = False
        return np.concatenate([self.frequent, np.flatnonzero(others)]).astype(np.int32)

    @cached_property
    def _ranks(self) -> np.ndarray:
        ranks = np.empty(self.num_classes, dtype=np.int64)
        ranks[self._ids] = np.arange(self.num_classes)
        return ranks
