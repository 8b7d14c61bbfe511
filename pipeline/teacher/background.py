"""A worker thread behind a bounded queue, whose failure is the failure of whoever feeds it.

put(item) -> queue -> consume(item), in order, on the thread; leaving the block waits for the rest
"""

import threading
from collections.abc import Callable
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_LOOK_SECONDS = 0.1  # how often a blocked side looks whether the other one is still there


class Background(Generic[Item]):
    """Consume items in order while the caller makes the next.

    Leaving the `with` block waits until all is consumed. An exception of `consume` is raised by the
    next `put`, or on leaving; nothing is consumed after it. When the block itself fails, what still
    waits is dropped.
    """

    def __init__(self, consume: Callable[[Item], None], depth: int) -> None:
        """Prepare the thread.

        Args:
            consume: called on the thread with each item.
            depth: items that may wait before `put` blocks.
        """
        self._consume = consume
        self._queue: Queue[Item] = Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stillroom-writer", daemon=True)

    def put(self, item: Item) -> None:
        """Hand an item over; blocks while `depth` items wait.

        Raises:
            BaseException: what `consume` raised.
        """
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._queue.put(item, timeout=_LOOK_SECONDS)
            except Full:
                continue

    def __enter__(self) -> "Background[Item]":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._drop_waiting()
        self._closing.set()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                item = self._queue.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            try:
                self._consume(item)
            except BaseException as failure:
                self._error = failure
                return

    def _drop_waiting(self) -> None:
        while not self._queue.empty():
            try:
                self._queue.get_nowait()
            except Empty:
                return
