"""Seconds of device work, measured without making the device wait."""

import threading
import time
from collections import deque
from types import TracebackType

import torch


class Stopwatch:
    """Sum of the times between entering and leaving; a GPU's work is timed by its own events.

    Several threads may use it at once: the sum is then of the times of all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._adding = threading.Lock()
        self._entered = threading.local()
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._on_gpu:
            self._entered.event = self._mark()
        else:
            self._entered.time = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._on_gpu:
            # Whole pairs only: another thread reads them.
            self._pairs.append((self._entered.event, self._mark()))
        else:
            self._add(time.perf_counter() - self._entered.time)

    @property
    def seconds(self) -> float:
        """The sum so far; on a GPU it waits for the work that is measured."""
        while self._pairs:
            begin, end = self._pairs.popleft()
            end.synchronize()
            self._add(begin.elapsed_time(end) / 1000.0)
        return self._seconds

    def _add(self, seconds: float) -> None:
        with self._adding:
            self._seconds += seconds

    def _mark(self) -> torch.cuda.Event:
        """An event behind all that this thread has asked of the device."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
