"""The shards that a process is to write: of its range those that do not stand, one at a time.

    rounds() -> take() -- claim --> write -- give_back() -->     until all of them stand

Beside others each shard is claimed before the teacher is asked about it, so that none is asked
twice. What others have claimed is waited for, and claimed if they die.
"""

import threading
import time
from collections.abc import Iterator, Sequence

from pipeline.cache.writer import CacheWriter
from pipeline.errors import ConfigError
from pipeline.locking.locks import Occupant, lengthen_pauses


class Shards:
    """What is to be written, shard by shard.

    Attributes:
        wanted: their numbers, ascending.
    """

    def __init__(self, writer: CacheWriter, here: Occupant, wanted: range | None = None) -> None:
        """Plan the work.

        Args:
            writer: knows which shards stand.
            here: this process.
            wanted: only these; all by default.
        """
        self._writer = writer
        self._here = here
        self._again = threading.Event()
        self.wanted: Sequence[int] = range(writer.draft.num_shards) if wanted is None else wanted

    @property
    def session(self) -> str:
        """A name for this piece of work that no other has."""
        return self._here.owner.token

    def rounds(self) -> Iterator[None]:
        """Come back whenever there may be shards to take, until all that are wanted stand."""
        pauses = lengthen_pauses()
        told = False
        while self._missing():
            yield
            self._here.require()
            if self._again.is_set():
                self._again.clear()
                continue
            missing = self._missing()
            if missing:
                if not told:
                    self._here.tell(
                        f"{self._writer.path}: waits for {len(missing)} shards that other"
                        " processes have claimed"
                    )
                told = True
                time.sleep(next(pauses))

    def take(self) -> Iterator[int]:
        """Claim one shard after the other, each when it is asked for; those of others are left."""
        for index in self._order():
            if self._stands(index):
                continue
            if not self._here.claim(_name(index)):
                if self._writer.ready:
                    continue
                return  # shard 0, which all others need
            if self._stands(index):  # since we looked
                self.give_back(index)
                continue
            yield index

    def give_back(self, index: int) -> None:
        """Let go of a shard that stands."""
        self._here.release(_name(index))

    def put_back(self, index: int) -> None:
        """Let go of a shard that does not stand, to be taken once more."""
        self.give_back(index)
        self._again.set()

    def require(self, index: int) -> None:
        """Make sure that a shard was not taken over from this process; see `Occupant.require`."""
        self._here.require(_name(index))

    def _order(self) -> Iterator[int]:
        if not self._writer.ready and 0 not in self.wanted:
            yield 0
        yield from self.wanted

    def _missing(self) -> list[int]:
        if self._here.owner.shared:
            self._writer.list_missing()  # looks for those of others
        return sorted(set(self.wanted) - self._writer.finished)

    def _stands(self, index: int) -> bool:
        if self._here.owner.shared:
            return self._writer.stands(index)
        return index in self._writer.finished  # nobody else writes any


def read_range(text: str) -> tuple[int, int | None]:
    """Read `A:B`, the shards from A up to B, B not among them; either may be left out.

    Raises:
        ConfigError: no such range, or none of a shard.
    """
    first, colon, last = text.partition(":")
    numbers = [number or "0" for number in (first, last)]
    if not colon or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(f"--shard-range {text}: is no range; give it as 0:100, 100: or :100")
    start, stop = map(int, numbers)
    if last and stop <= start:
        raise ConfigError(
            f"--shard-range {text}: holds no shard, as the second number is not among them; give"
            " it as 0:100, 100: or :100"
        )
    return start, stop if last else None


def parse_range(text: str, count: int) -> range:
    """The shards of a cache of `count` that are in a range; see `read_range`.

    Raises:
        ConfigError: no such range, or none of its shards is among them.
    """
    start, stop = read_range(text)
    found = range(start, count if stop is None else min(stop, count))
    if not found:
        raise ConfigError(
            f"--shard-range {text}: holds none of the cache's {count:,} shards, which are"
            f" 0:{count}; the second number is not among them"
        )
    return found


def _name(index: int) -> str:
    return f"shard-{index:05d}"
