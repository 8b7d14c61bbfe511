"""What may befall an operation: a kill, or an error of the disk, from a chosen one on.

kill_at(number), fail_from(number, errno) -> a judge for `supervise`
"""

import errno
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torture_syscalls import Judge, Operation, Verdict

_MAKING = ("open", "write", "mkdir", "truncate")
_CHANGING = ("open", "mkdir", "rename", "unlink", "rmdir", "truncate")
FAULTS = {  # which operations fail from the chosen one on; EIO that one alone
    "ENOSPC": _MAKING,
    "EDQUOT": (*_MAKING, "close"),
    "EROFS": _CHANGING,
    "EACCES": _CHANGING,
    "EMFILE": ("open",),
    "EIO": ("open", "write", "sync", "close", "rename", "unlink", "mkdir", "rmdir", "truncate"),
    "ENOENT": _MAKING,  # the folder is removed, in earnest
}


def harmless(operation: Operation) -> Verdict:
    """All runs, but nobody waits for the disk: what a killed process wrote is there anyway."""
    return Verdict.SKIP if operation.kind == "sync" else Verdict.LET


def kill_at(number: int, tear: bool) -> Judge:
    """Kill the process at an operation.

    Args:
        tear: in the middle of it, where it is a write.
    """

    def judge(operation: Operation) -> Verdict:
        return Verdict.TEAR if tear and operation.kind == "write" else Verdict.KILL

    return _from(number, judge)


def fail_from(number: int, name: str, folder: Path) -> Judge:
    """Let the disk fail from an operation on.

    Args:
        name: of FAULTS. A full disk takes half of the write that it is full at.
        folder: what vanishes with ENOENT.
    """
    begun: list[bool] = []

    def judge(operation: Operation) -> Verdict | int:
        first = not begun
        if name == "ENOENT" or operation.kind not in FAULTS[name] or (begun and name == "EIO"):
            if name == "ENOENT" and first:
                begun.append(True)
                shutil.rmtree(folder, ignore_errors=True)
            return harmless(operation)
        begun.append(True)
        if operation.kind == "write" and name == "ENOSPC" and first:
            return Verdict.SHORT
        return int(getattr(errno, name))

    return _from(number, judge)


def slow_down(seconds: float, number: int, meanwhile: Callable[[], None]) -> Judge:
    """Let every operation take so long, and something else happen before that of a number."""
    seen = iter(range(sys.maxsize))

    def judge(operation: Operation) -> Verdict:
        time.sleep(seconds)
        if next(seen) == number:
            meanwhile()
        return harmless(operation)

    return judge


def _from(number: int, judge: Callable[[Operation], Verdict | int]) -> Judge:
    """All before the operation of that number passes."""
    seen = iter(range(sys.maxsize))
    return lambda operation: harmless(operation) if next(seen) < number else judge(operation)
