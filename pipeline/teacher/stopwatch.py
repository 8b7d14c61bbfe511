"""Seconds of device work, measured without making the device wait."""

import time
from collections import deque
from types import TracebackType

import torch


class Stopwatch:
    """Sum of the times between entering and leaving; a GPU's work is timed by its own events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._begin: torch.cuda.Event | None = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._on_gpu:
            self._begin = _make_event()
            self._begin.record()
        else:
            self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._begin is not None:
            end = _make_event()
            end.record()
            self._pairs.append((self._begin, end))  # whole pairs only: another thread reads them
        else:
            self._seconds += time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """The sum so far; on a GPU it waits for the work that is measured."""
        while self._pairs:
            begin, end = self._pairs.popleft()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000.0
        return self._seconds


def _make_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
