"""The order in which an epoch visits a cache: shuffled, and yet kind to the disk.

    place in the epoch -> block of neighbours, by a permutation of all blocks -> shuffled among the
    rows of the few blocks that share a buffer -> row

Nothing is stored: any part of the order is computed from where it stands, so that an epoch of 10^9
rows begins, or continues anywhere, at once. It is a pure function of its arguments, on any machine:
integer arithmetic modulo 2^64 and a sort of distinct keys, no library's random numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

BUFFER_BLOCKS = 16
_CHUNK_BUFFERS = 32  # computed together: numpy's calls cost more than its arithmetic below that
_ROUNDS = 64
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class EpochOrder:
    """A permutation of `count` rows, read by slices. Rank r of w ranks takes `order[r::w]`.

    Attributes:
        count: how many rows there are.
        block: neighbouring rows that stay together until the last step; the order is a full shuffle
            where all rows fit into one buffer.
        seed: of the run, epoch: from 0; each pair gives another order. Both may be any integers.
        buffer_blocks: blocks that are shuffled among one another, row by row.
    """

    count: int
    block: int
    seed: int
    epoch: int
    buffer_blocks: int = BUFFER_BLOCKS

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1, found {self.block}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, places: slice) -> np.ndarray:
        """[n] int64, the rows at some places of the epoch; only their own part is computed."""
        size = self._buffer * _CHUNK_BUFFERS
        return slice_chunks(self.count, size, lambda chunk: _order_chunk(self, chunk), places)

    @property
    def _buffer(self) -> int:
        return self.block * self.buffer_blocks

    @cached_property
    def _key(self) -> int:
        return _mix_one(_mix_one(self.seed % 2**64) ^ (self.epoch % 2**64))

    @cached_property
    def _offset(self) -> int:
        """Borders move from epoch to epoch, so that no two rows are together in every one."""
        return _mix_one(self._key ^ 1) % self.block

    @cached_property
    def _blocks(self) -> int:
        return -(-(self.count + self._offset) // self.block)

    @cached_property
    def _short(self) -> tuple[tuple[int, int], ...]:
        """(place, rows less than `block`) of the first and of the last block."""
        last = self._blocks * self.block - self._offset - self.count
        ends = self._permute(np.array([0, self._blocks - 1]), inverse=True)
        return (int(ends[0]), self._offset), (int(ends[1]), last)

    def _permute(self, blocks: np.ndarray, inverse: bool = False) -> np.ndarray:
        return permute(blocks, np.array([self._blocks]), np.array([self._key], np.uint64), inverse)

    def _find_start(self, places: np.ndarray) -> np.ndarray:
        """Where in the epoch the blocks at these places of the permutation begin."""
        starts = places * self.block
        for place, missing in self._short:
            starts = starts - np.where(places > place, missing, 0)
        return starts

    def compute(self, first: int, last: int) -> np.ndarray:
        """The rows at places first to last of the epoch, both at borders of buffers or its end."""
        places = np.arange(first, last)
        at = places // self.block
        for _ in self._short:
            at += places >= self._find_start(at + 1)
        used = np.arange(at[0], at[-1] + 1)
        starts = self._permute(used) * self.block - self._offset
        # The first block lacks its first rows, not its last.
        rows = np.maximum(starts, 0)[at - used[0]] + places - self._find_start(at)
        keys = mix(places.astype(np.uint64) ^ np.uint64(self._key))
        whole = len(rows) // self._buffer * self._buffer
        square = (-1, self._buffer)
        inner = np.argsort(keys[:whole].reshape(square), axis=1, kind="stable")
        head = np.take_along_axis(rows[:whole].reshape(square), inner, axis=1).ravel()
        return np.concatenate([head, rows[whole:][np.argsort(keys[whole:], kind="stable")]])


def epoch_order(rows: int | np.ndarray, block: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64, all of an epoch's order at once: of n rows, or of these rows."""
    if isinstance(rows, int):
        return EpochOrder(rows, block, seed, epoch)[:]
    picked: np.ndarray = np.asarray(rows)[EpochOrder(len(rows), block, seed, epoch)[:]]
    return picked


def slice_chunks(
    count: int, size: int, compute: Callable[[int], np.ndarray], places: slice
) -> np.ndarray:
    """[n] int64, some places of what is computed in chunks of `size`, only as far as needed.

    Args:
        count: of all places.
        compute: chunk -> its rows; those of the last one may be fewer.
    """
    start, stop, step = places.indices(count)
    if step < 0:
        raise ValueError("an order is read forwards")
    parts = []
    for chunk in range(start // size, -(-stop // size)):
        begin = chunk * size
        first = start if start >= begin else start + -(-(begin - start) // step) * step
        parts.append(compute(chunk)[first - begin : stop - begin : step])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@lru_cache(maxsize=8)
def _order_chunk(order: EpochOrder, chunk: int) -> np.ndarray:
    size = order.block * order.buffer_blocks * _CHUNK_BUFFERS
    return order.compute(chunk * size, min((chunk + 1) * size, order.count))


def permute(
    values: np.ndarray, counts: np.ndarray, keys: np.ndarray, inverse: bool = False
) -> np.ndarray:
    """[n] int64, each value in a keyed permutation of [0, count): in each round either stay or swap
    with the mirror image about a random centre, as the larger of the two is told (the swap-or-not
    shuffle of Hoang, Morris and Rogaway).

    Args:
        values: [n] int64; counts: [n] or one for all.
        keys: uint64, [n] or one for all.
    """
    rounds = range(_ROUNDS)
    for number in reversed(rounds) if inverse else rounds:
        key = mix(keys ^ np.uint64(number + 2))
        centre = (key % counts.astype(np.uint64)).astype(np.int64)
        mirrored = (centre - values) % counts
        larger = np.maximum(values, mirrored).astype(np.uint64)
        values = np.where(mix(larger ^ key) & np.uint64(1), mirrored, values)
    return values


def shuffle_decks(
    places: np.ndarray, counts: np.ndarray, blocks: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """[n] int64, the card at each place of a shuffled deck, for every place another deck.

    Blocks of neighbours stay together. A place that meets a card which the last block lacks goes on
    to where that card's place leads, which is a permutation of the cards there are.

    Args:
        places: [n], below the count of their deck; counts: [n], the cards of each deck.
        blocks: [n], how many cards of it stay together.
        keys: [n] uint64; equal ones shuffle decks of one size alike.
    """
    cards, moving = places.copy(), np.arange(len(places))
    while len(moving):
        block, count = blocks[moving], counts[moving]
        at, inside = np.divmod(cards[moving], block)
        cards[moving] = permute(at, -(-count // block), keys[moving]) * block + inside
        moving = moving[cards[moving] >= count]
    return cards


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: uint64 to uint64, one to one."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _mix_one(value: int) -> int:
    return int(mix(np.array([value & _MASK], dtype=np.uint64))[0])
