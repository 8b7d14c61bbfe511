"""What one process holds open of a cache: its shards, and what was decompressed last."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from pipeline.cache.ahead import Ahead
from pipeline.cache.record_batch import Batch
from pipeline.cache.shards import Shard
from pipeline.cache.signals.quantization import Block

_OPEN_SHARDS = 32
_FEWEST_SHARDS = 4
_MEMORY = 256 * 2**20

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Keeps what was used last, up to a limit of cost."""

    def __init__(self, limit: int, cost: Callable[[Value], int]) -> None:
        self._limit, self._cost, self._total = limit, cost, 0
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()

    def drop(self, key: Hashable) -> None:
        if key in self._kept:
            self._total -= self._cost(self._kept.pop(key))

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = make()
        self._kept[key] = value
        self._total += self._cost(value)
        while self._total > self._limit and len(self._kept) > 1:
            self._total -= self._cost(self._kept.popitem(last=False)[1])
        return value


class Forks:
    """How many forks this process is away from the first one; cheaper to ask than its id."""

    count = 0

    @classmethod
    def add(cls) -> None:
        cls.count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Forks.add)


class Opened:
    """What one process holds open: never shared over a fork, where a lock may be held for ever.

    Args:
        shared_by: how many caches are read as one and keep no more together than one alone.
    """

    def __init__(self, shared_by: int = 1) -> None:
        self.forks = Forks.count
        self.lock = threading.RLock()
        self.ahead: Ahead | None = None
        shards, memory = max(_OPEN_SHARDS // shared_by, _FEWEST_SHARDS), _MEMORY // shared_by
        self.shards: Recent[Shard] = Recent(shards, lambda _: 1)
        self.batches: Recent[Batch] = Recent(memory, lambda batch: batch.nbytes)
        self.blocks: Recent[Block] = Recent(memory, lambda block: block.nbytes)
