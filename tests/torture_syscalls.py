"""Every file operation of a process, in whatever language it is made, held until it is judged.

    forked child: filter -- open, write, fsync, rename, ... --> Operation -- judge --> verdict

Linux hands a system call to another process before it runs (seccomp user notification: man 2
seccomp_unotify), so what pyarrow's C++ and safetensors' Rust write is seen like what Python writes,
without a compiler and without root.
"""

import ctypes
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from torture_filter import CALLS, LIBC, MACHINES, install

_PIDFD_GETFD = 438
_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101  # ioctls of the listener
_CONTINUE = 1
_AT, _FROM_SEVERAL = 1, 2  # among the calls that write: pwrite, writev
_AT_CWD, _AT_REMOVEDIR = -100, 0x200
_HUNG_SECONDS = 300.0


class Verdict(Enum):
    """What becomes of an operation; an int is the errno that it fails with."""

    LET = "it runs"
    SKIP = "it is said to have run"
    KILL = "the process dies before it"
    TEAR = "the process dies when half of the bytes are written"
    SHORT = "half of the bytes are written, which the process is told"


@dataclass(frozen=True)
class Operation:
    """One operation that changes files, about to run.

    Attributes:
        kind: a key of `CALLS`.
        path: of the file or folder; where a rename comes from.
        target: where a rename goes.
        size: bytes of a write.
    """

    kind: str
    path: str
    target: str = ""
    size: int = 0


Judge = Callable[[Operation], Verdict | int]


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: exit code, or minus the signal.
        text: what it printed.
        seconds: it took.
    """

    code: int
    text: str
    seconds: float = field(default=0.0, compare=False)

    @property
    def done(self) -> bool:
        """Whether the command did what it could; 3 says that another one has to follow."""
        return self.code in (0, 3)

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


def can_watch() -> bool:
    """Whether this machine hands system calls over (Linux 5.5 and later, unless forbidden)."""
    if platform.machine() not in MACHINES or sys.platform != "linux":
        return False
    child = os.fork()
    if not child:
        with suppress(OSError):
            install()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def supervise(
    act: Callable[[], None],
    log: Path,
    judge: Judge | None = None,
    root: Path | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Run a function in a forked child.

    Args:
        act: what the child does.
        log: a file that takes what it prints.
        judge: asked about every operation below `root`; None lets all pass unseen.
        root: the folder that is watched.
        kill_after: seconds after which it is killed, wherever it is.

    Raises:
        TimeoutError: it hangs.
    """
    ours, theirs = socket.socketpair()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        ours.close()
        _be_child(act, log, theirs, watched=judge is not None)
    theirs.close()
    try:
        listener = -1
        if judge is not None:
            listener = socket.recv_fds(ours, 1, 1)[1][0]
        deadline = began + (_HUNG_SECONDS if kill_after is None else kill_after)
        _attend(child, listener, judge, str(root), deadline)
        if time.perf_counter() >= deadline:
            os.kill(child, signal.SIGKILL)
            if kill_after is None:
                raise TimeoutError(f"hangs: {log.read_text(encoding='utf-8')[-2000:]}")
    finally:
        ours.close()
        if listener >= 0:
            os.close(listener)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, log.read_text(encoding="utf-8"), time.perf_counter() - began)


def _be_child(act: Callable[[], None], log: Path, parent: socket.socket, watched: bool) -> None:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if watched:
            listener = install()
            socket.send_fds(parent, [b"."], [listener])
            os.close(listener)
        act()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _attend(child: int, listener: int, judge: Judge | None, root: str, deadline: float) -> None:
    """Judge what the child does until it has ended, or the deadline is there."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    if judge is not None:
        poll.register(listener, select.POLLIN)
    try:
        while (left := deadline - time.perf_counter()) > 0.0:
            found = poll.poll(1000.0 * left)
            if any(one == ended for one, _ in found):
                return
            if found and judge is not None:
                _answer(child, listener, judge, root)
    finally:
        os.close(ended)


def _answer(child: int, listener: int, judge: Judge, root: str) -> None:
    told = ctypes.create_string_buffer(80)
    if LIBC.ioctl(listener, ctypes.c_ulong(_RECEIVE), told) != 0:
        return  # its thread is gone
    number, thread, _, call, *arguments = struct.unpack("=QIIiIQ6Q", told.raw)
    del arguments[:2]
    verdict: Verdict | int = Verdict.LET
    value = 0
    with suppress(FileNotFoundError, ProcessLookupError):  # killed while it is looked at
        found = _describe(thread, call, arguments)
        if found is None:
            pass
        elif found.path.startswith(root) or found.target.startswith(root):
            verdict = judge(found)
        if verdict in (Verdict.TEAR, Verdict.SHORT):
            value = _write_half(child, thread, call, arguments)
    if verdict in (Verdict.KILL, Verdict.TEAR):
        os.kill(child, signal.SIGKILL)
        return
    error = -verdict if isinstance(verdict, int) else 0
    flags = _CONTINUE if verdict is Verdict.LET else 0
    answer = ctypes.create_string_buffer(struct.pack("=QqiI", number, value, error, flags))
    LIBC.ioctl(listener, ctypes.c_ulong(_ANSWER), answer)


def _describe(thread: int, call: int, arguments: list[int]) -> Operation | None:
    """The operation of a call; None where it closes what was only read."""
    column, _ = MACHINES[platform.machine()]
    kind, where = next(
        (kind, entry[2])
        for kind, entries in CALLS.items()
        for entry in entries
        if entry[column] == call
    )
    if where == "fd":
        if kind == "close":
            told = Path(f"/proc/{thread}/fdinfo/{arguments[0]}").read_text(encoding="ascii")
            if not int(told.split()[3], 8) & os.O_ACCMODE:
                return None
        path = str(Path(f"/proc/{thread}/fd/{arguments[0]}").readlink()).removesuffix(" (deleted)")
        return Operation(kind, path, size=arguments[2] if kind == "write" else 0)
    if kind == "unlink" and where == "at" and arguments[2] & _AT_REMOVEDIR:
        kind = "rmdir"
    at, step = where.startswith("at"), 2 if where == "ats" else 1
    paths = []
    for place in range(0, 2 * step if where.endswith("s") else 1, step):
        folder = ctypes.c_int32(arguments[place]).value if at else _AT_CWD
        name = _read_text(thread, arguments[place + at])
        base = Path(f"/proc/{thread}/{'cwd' if folder == _AT_CWD else f'fd/{folder}'}").readlink()
        paths.append(str(base / name))
    return Operation(kind, *paths)


def _read_text(thread: int, address: int) -> str:
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        content = b""
        while b"\0" not in content:
            memory.seek(address + len(content))
            found = memory.read(256 - (address + len(content)) % 256)
            if not found:
                raise ProcessLookupError(f"thread {thread} has no memory any more")
            content += found
    return os.fsdecode(content.partition(b"\0")[0])


def _write_half(child: int, thread: int, call: int, arguments: list[int]) -> int:
    """Write the first half of a write in the child's place; how many bytes."""
    address, size = arguments[1:3]
    place = [entry[MACHINES[platform.machine()][0]] for entry in CALLS["write"]].index(call)
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        if place == _FROM_SEVERAL:  # where each of its parts is: the first one will do
            memory.seek(address)
            address, size = struct.unpack("=QQ", memory.read(16))
        memory.seek(address)
        content = memory.read((size + 1) // 2)
    process = os.pidfd_open(child)
    file = LIBC.syscall(_PIDFD_GETFD, process, arguments[0], 0)
    os.close(process)
    if file < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    try:
        return os.pwrite(file, content, arguments[3]) if place == _AT else os.write(file, content)
    finally:
        os.close(file)
