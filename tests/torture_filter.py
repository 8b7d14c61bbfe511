"""The system calls that change files, and the filter that hands them to another process.

install() in the process that is to be watched -> the descriptor that its calls come to
"""

import ctypes
import os
import platform

LIBC = ctypes.CDLL(None, use_errno=True)
# kind -> its calls, each by number: x86_64, aarch64 (None: there is none); where its path is told.
CALLS: dict[str, list[tuple[int | None, int | None, str]]] = {
    "open": [(257, 56, "at"), (2, None, "path"), (85, None, "path")],
    "write": [(1, 64, "fd"), (18, 68, "fd"), (20, 66, "fd")],
    "truncate": [(77, 46, "fd")],
    "sync": [(74, 82, "fd"), (75, 83, "fd")],
    "close": [(3, 57, "fd")],
    "rename": [(82, None, "paths"), (264, 38, "ats"), (316, 276, "ats")],
    "unlink": [(87, None, "path"), (263, 35, "at")],
    "rmdir": [(84, None, "path")],
    "mkdir": [(83, None, "path"), (258, 34, "at")],
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint16), ("code", ctypes.POINTER(_Instruction))]


def install() -> int:
    """Filter the calling process from here on; the descriptor that its operations come to."""
    load, equal, has, end = 0x20, 0x15, 0x45, 0x06
    column, machine = MACHINES[platform.machine()]
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, _ALLOW), (load, 0, 0, 0)]
    for kind, entries in CALLS.items():
        for number, place in ((e[column], e[2]) for e in entries if e[column] is not None):
            if kind == "open":  # reading is nobody's business
                flags = 16 + 8 * (2 if place == "at" else 1)
                check = [(load, 0, 0, flags), (has, 0, 1, _WRITING), (end, 0, 0, _NOTIFY)]
                code += [(equal, 0, 4, number), *check, (end, 0, 0, _ALLOW)]
            else:
                code += [(equal, 0, 1, number), (end, 0, 0, _NOTIFY)]
    code.append((end, 0, 0, _ALLOW))
    program = _Program(len(code), (_Instruction * len(code))(*(_Instruction(*c) for c in code)))
    if LIBC.prctl(38, 1, 0, 0, 0) != 0:  # no new privileges, which a filter asks for
        raise OSError(ctypes.get_errno(), "prctl")
    number = _SECCOMP[platform.machine()]
    listener = int(LIBC.syscall(number, 1, 8, ctypes.byref(program)))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener
