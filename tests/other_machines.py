"""Processes that others take for those of other machines: each has a host's name of its own."""

import ctypes
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

_NEW_USER, _NEW_NAMES = 0x10000000, 0x04000000  # CLONE_NEWUSER, CLONE_NEWUTS


def move_to(host: str, environment: Mapping[str, str]) -> None:
    """Put this process, which has one thread, on another machine.

    Where the kernel lets it have no name of its own, Python alone is told another.
    """
    os.environ.update(environment)
    kernel = ctypes.CDLL(None)
    if kernel.unshare(_NEW_NAMES) == 0 or kernel.unshare(_NEW_USER | _NEW_NAMES) == 0:
        with suppress(OSError):
            socket.sethostname(host)
    if socket.gethostname() != host:
        socket.gethostname = lambda: host
