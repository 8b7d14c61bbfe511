"""How often an epoch shows the examples of a language, or of any other value of a column.

    rows of each value -> Sampling.deal -> Deal: draws of each per epoch -> SampledOrder -> rows

Each group is an endless deck: all of its rows in one order, then all of them in another. An epoch
takes a fixed number of draws from each deck, from where the epoch before stopped: a small group is
gone through several times, a large one over several epochs, and no row of a group ever comes a
second time more often than another. Nothing is stored: any part of an epoch is computed from where
it stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import Field

from pipeline.cache import EpochOrder, RowRuns, hash_id
from pipeline.cache.order import mix, shuffle_decks, slice_chunks
from pipeline.config import StrictModel
from pipeline.errors import ConfigError, did_you_mean

_RUN = 8  # neighbours of a group that stay near one another, for the disk
_MIXED = 256  # such runs that are shuffled among one another, for the batch
_CHUNK = _RUN * _MIXED * 32  # computed together
_SHUFFLED = 1024  # a group of fewer than twice so many rows is shuffled row by row


class Sampling(StrictModel):
    """How many examples of each language, or of any other value of a column, make an epoch.

    A value l with n_l rows has the share p_l of the draws, p_l proportional to
    weights_l * min(n_l, cap) ** exponent, as in XLM (Conneau and Lample, 2019; there 0.5), mBERT
    (0.7) and XLM-R (Conneau et al., 2020; 0.3), with the cap of T5 (Raffel et al., 2020). Shares
    become whole draws by largest remainder, at least one for each.

    Attributes:
        by: the column, carried in the cache or by `inputs`.
        exponent: 1 keeps the proportions of the data, 0 makes all equal; 1 / temperature.
        cap: a value counts as having no more rows than this.
        weights: factors of the shares, 1 where left out; 0 leaves a value out.
        max_repeats: no row comes more often than this in an epoch (Chung et al., 2023); what that
            takes from small values goes to the others.
        examples: draws of an epoch; the sum of min(n_l, cap) where left out.
    """

    by: str
    exponent: float = Field(default=1.0, ge=0.0)
    cap: int | None = Field(default=None, ge=1)
    weights: dict[str, float] = {}
    max_repeats: int | None = Field(default=None, ge=1)
    examples: int | None = Field(default=None, ge=1)

    def deal(self, groups: Mapping[str, RowRuns]) -> "Deal":
        """Decide the draws of each group.

        Args:
            groups: value -> its rows; none without a row is drawn from.

        Raises:
            ConfigError: a weight of no such value or below 0, or an epoch that cannot be.
        """
        for name, weight in self.weights.items():
            if name not in groups:
                hint = did_you_mean(name, groups)
                raise ConfigError(f"sampling.weights: no {self.by} is {name!r}{hint}")
            if weight < 0:
                raise ConfigError(f"sampling.weights.{name}: is {weight:g}, expected 0 or more")
        drawn = {
            name: rows for name, rows in groups.items() if len(rows) and self.weights.get(name, 1)
        }
        counts = np.array([len(rows) for rows in drawn.values()], dtype=np.int64)
        counted = counts if self.cap is None else np.minimum(counts, self.cap)
        total = int(counted.sum()) if self.examples is None else self.examples
        most = counts * (self.max_repeats or total)
        if not 1 <= len(counts) <= total <= most.sum():
            raise ConfigError(
                f"sampling: an epoch of {total:,} examples cannot be drawn from {len(counts)}"
                f" values of {self.by}, one to {int(most.sum()):,} in all; change sampling.examples"
            )
        weights = np.array([self.weights.get(name, 1.0) for name in drawn])
        shares = weights * (counted / counted.max()) ** self.exponent
        return Deal(tuple(drawn), tuple(drawn.values()), apportion(shares, total, most))


def apportion(shares: np.ndarray, total: int, most: np.ndarray) -> np.ndarray:
    """[n] int64 that sum to `total`, in proportion to the shares by largest remainder.

    Each is at least 1 and at most `most`; what a bound gives or takes is shared by the others.
    """
    low, high = 0.0, float((most / shares).max())
    for _ in range(200):  # halving: the sum grows with the scale
        scale = (low + high) / 2
        if np.clip(scale * shares, 1, most).sum() < total:
            low = scale
        else:
            high = scale
    quotas = np.clip(high * shares, 1, most).round(6)  # no machine's last bit decides
    whole = np.floor(quotas).astype(np.int64)
    rest = np.argsort(whole - quotas, kind="stable")[: total - int(whole.sum())]
    whole[rest] += 1
    return whole


@dataclass(frozen=True, eq=False)
class Deal:
    """What an epoch draws from each group; its length is that of an epoch.

    Attributes:
        names: the groups.
        rows: of each group.
        draws: [groups] int64, of an epoch.
    """

    names: tuple[str, ...]
    rows: tuple[RowRuns, ...]
    draws: np.ndarray

    def __len__(self) -> int:
        return int(self.draws.sum())

    def describe(self) -> dict[str, dict[str, int]]:
        """Rows and draws of an epoch by group, for result.json."""
        return {
            name: {"rows": len(rows), "draws": int(draws)}
            for name, rows, draws in zip(self.names, self.rows, self.draws, strict=True)
        }

    def order(self, seed: int, epoch: int) -> "SampledOrder":
        """The order of an epoch."""
        return SampledOrder(self, seed, epoch)


@dataclass(frozen=True, eq=False)
class SampledOrder:
    """The rows of an epoch in order, read by slices like an `EpochOrder`.

    Place -> place in the decks laid end to end, shuffled in short runs -> group, and how many
    draws it is into the group's deck -> which time through the rows, and row.
    """

    deal: Deal
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.deal)

    def __getitem__(self, places: slice) -> np.ndarray:
        """[n] int64, the rows at some places of the epoch."""
        return slice_chunks(len(self), _CHUNK, lambda chunk: _draw_chunk(self, chunk), places)

    def draw(self, start: int, stop: int) -> np.ndarray:
        """The rows at places start to stop."""
        shuffled = EpochOrder(len(self), _RUN, self.seed, self.epoch, _MIXED)[start:stop]
        ends = np.cumsum(self.deal.draws)
        group = np.searchsorted(ends, shuffled, side="right")
        drawn = shuffled - (ends - self.deal.draws)[group] + self.epoch * self.deal.draws[group]
        counts = np.array([len(rows) for rows in self.deal.rows], dtype=np.int64)
        time, place = np.divmod(drawn, counts[group])
        seeds = [hash_id(name) ^ (self.seed % 2**64) for name in self.deal.names]
        keys = mix(mix(np.array(seeds, dtype=np.uint64))[group] ^ time.astype(np.uint64))
        blocks = np.clip(counts // _SHUFFLED, 1, _RUN)
        cards = shuffle_decks(place, counts[group], blocks[group], keys)
        rows = np.empty_like(cards)
        order = np.argsort(group, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            rows[part] = self.deal.rows[group[part[0]]][cards[part]]
        return rows


@lru_cache(maxsize=2)
def _draw_chunk(order: SampledOrder, chunk: int) -> np.ndarray:
    return order.draw(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(order)))
