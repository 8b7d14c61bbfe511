"""What one process holds open of a cache: its shards, and what was decompressed last."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from pipeline.cache.quantization import Block
from pipeline.cache.record_batch import Batch
from pipeline.cache.shards import Shard

_OPEN_SHARDS = 32
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
    """What one process holds open: never shared over a fork, where a lock may be held for ever."""

    def __init__(self) -> None:
        self.forks = Forks.count
        self.lock = threading.RLock()
        self.shards: Recent[Shard] = Recent(_OPEN_SHARDS, lambda _: 1)
        self.batches: Recent[Batch] = Recent(_MEMORY, lambda batch: batch.nbytes)
        self.blocks: Recent[Block] = Recent(_MEMORY, lambda block: block.nbytes)
