"""Real processes for tests: one imports the house once, and the others are forked from it."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["stages.cache_teacher"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "t5")]
)


def strike_once(
    found: Callable[[str], object], number: signal.Signals = signal.SIGKILL, before: str = "open"
) -> None:
    """Send this process a signal, once, before it opens a file of a name for which something holds.

    Nobody has to notice from outside, who might look too late.

    Args:
        before: another of Python's audit events whose first argument is a name.
    """
    struck = threading.Lock()

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == before and found(str(arguments[0])) and struck.acquire(blocking=False):
            signal.pthread_kill(threading.get_ident(), number)  # which does not go a step further

    sys.addaudithook(look)
