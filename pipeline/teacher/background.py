"""Threads whose failure is the failure of whoever feeds them, and that never run far ahead.

items -- map_in_order --> function(item) on several threads -> results, in order of the items
put(item) -> queue -> consume(item), in order, on one thread; leaving the block waits for it
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 0.1  # how often a blocked side looks whether the other one is still there


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Apply a function on `workers` threads, giving the results in the order of the items.

    At most two items per worker are under way or waiting to be taken. What the function or the
    items raise is raised here, once what runs has ended; nothing is begun after it.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="stillroom-teacher") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def one_thread_each(apply: bool) -> Iterator[None]:
    """Let every thread that begins in the block compute on its own core alone.

    Several threads that each spread a product over all cores wait for one another.
    """
    threads = torch.get_num_threads()
    if apply:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Background(Generic[Item]):
    """Consume items in order on a thread while the caller makes the next.

    Leaving the `with` block waits until all is consumed. An exception of `consume` is raised by the
    next `put`, or on leaving. When the block itself fails, the iterator that `consume` reads raises
    `AbandonedError` in place of what still waits, so that its own blocks are left by an exception.
    """

    def __init__(self, consume: Callable[[Iterator[Item]], None], depth: int) -> None:
        """Prepare the thread.

        Args:
            consume: called once, on the thread, with the items as they come.
            depth: items that may wait before `put` blocks.
        """
        self._consume = consume
        self._queue: Queue[Item] = Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._closing, self._failed = threading.Event(), threading.Event()
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
            self._failed.set()
        self._closing.set()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._consume(self._items())
        except BaseException as failure:
            self._error = failure

    def _items(self) -> Iterator[Item]:
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                item = self._queue.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            if self._failed.is_set():
                raise AbandonedError
            yield item
        if self._failed.is_set():
            raise AbandonedError


class AbandonedError(Exception):
    """The feeder of a `Background` failed; what it had begun is not to be finished."""
