"""A process that works in a folder, and whether it still lives.

On its own machine the process id tells, with the time at which the process began, since ids are
used again. Elsewhere its heartbeat tells: it rewrites its file, every ten seconds unless it is told
otherwise, with a number one higher. Whoever waits compares what it reads with what it read before,
so the clocks of two machines need not agree, and waits for as long as the other one says.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.storage import read_seconds

PATIENCE_VARIABLE = "STILLROOM_LOCK_PATIENCE"
BEATS = 6  # while others are patient
_PATIENCE = 60.0
_ABANDONED_SECONDS = 3600.0  # so old by the clock that nobody needs to watch it


def find_patience() -> float:
    """Seconds without a heartbeat after which this process may be taken for dead.

    Raises:
        StoreError: the environment says what is no number above 0.
    """
    return min(_ABANDONED_SECONDS, read_seconds(PATIENCE_VARIABLE, _PATIENCE))


def find_machine() -> str:
    """Of one boot of one machine, and of one space of process ids in it."""
    parts = [socket.gethostname()]
    with suppress(FileNotFoundError, PermissionError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(FileNotFoundError, PermissionError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Owner:
    """Who works in a folder.

    Attributes:
        token: of this piece of work, never used again.
        host, process: for whoever reads a message; since: when it began, for the same.
        purpose: the command.
        shared: whether it shares the work with others.
        admitted: false while it waits at the gate, and when it has left.
        machine: tells machines and containers of one host name apart.
        started: when the process began, as the machine counts; empty where it does not say.
        beat: how many heartbeats there were; seen: seconds since 1970 at the last one.
        patience: seconds without one after which whoever waits may take it for dead.
    """

    token: str
    purpose: str
    shared: bool
    admitted: bool = False
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    machine: str = field(default_factory=find_machine)
    started: str = field(default_factory=lambda: _find_start(os.getpid()) or "")
    beat: int = 0
    seen: float = field(default_factory=time.time)
    patience: float = field(default_factory=find_patience)

    @classmethod
    def parse(cls, content: bytes) -> "Owner | None":
        """Read what `dump` gave; None where it is damaged. A newer Stillroom may say more."""
        try:
            known = {one.name for one in fields(cls)}
            said = {name: value for name, value in json.loads(content).items() if name in known}
            owner = cls(**said)
        except (AttributeError, ValueError, TypeError):
            return None
        fits = isinstance(owner.beat, int) and isinstance(owner.process, int)
        times = all(isinstance(number, int | float) for number in (owner.seen, owner.patience))
        return owner if fits and times else None

    def dump(self) -> bytes:
        """The content of its file."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def alive(self, **changes: Any) -> "Owner":
        """The same, one heartbeat later."""
        return replace(self, beat=self.beat + 1, seen=time.time(), **changes)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (stillroom {self.purpose})"


class Witness:
    """Remembers when others last gave a sign of life."""

    def __init__(self) -> None:
        self._machine = find_machine()
        self._heard: dict[str, tuple[int, float, bool]] = {}

    def is_alive(self, owner: Owner) -> bool | None:
        """Whether a process still lives; None where only time will tell."""
        if owner.machine == self._machine:
            runs = _runs(owner)
            if runs is not None:
                return runs
        elif time.time() - owner.seen > _ABANDONED_SECONDS:
            return False
        return self.hears(owner.token, owner.beat, min(_ABANDONED_SECONDS, owner.patience))

    def hears(self, token: str, beat: int, patience: float) -> bool | None:
        """Note a number; whether it moves: False where it has not for so many seconds."""
        now = time.monotonic()
        before, since, moved = self._heard.get(token, (beat, now, False))
        if before != beat:
            since, moved = now, True
        self._heard[token] = (beat, since, moved)
        if now - since > patience:
            return False
        return True if moved else None


def _runs(owner: Owner) -> bool | None:
    """Whether a process of this machine runs; None where the machine does not say."""
    if Path("/proc/self/stat").is_file():
        with suppress(PermissionError):  # another user's, which the machine hides
            return _find_start(owner.process) == owner.started
        return None
    if os.name != "posix":
        return None
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True if owner.process == os.getpid() else None  # another may have got its id


def _find_start(process: int) -> str | None:
    """When a process began, in the ticks of the machine; None where it has ended.

    Raises:
        OSError: nobody can say, for instance as too many files are open: it may well live.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return None if fields[0] in ("Z", "X") else fields[19]
