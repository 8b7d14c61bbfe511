"""Who works in a folder: one process alone, or several that share what is to do there.

    occupy(folder) -- through the gate --> Occupant -- claim("shard-00003") --> work -- release -->

    <folder>/locks/  gate           held for moments, by whoever comes or goes
                     <token>.json   one for each process: see `Owner`
                     <name>         who has claimed a piece of work: its token
                     <name>.<token> who has taken it over from a process that died

A file that is created exclusively is all that this needs, so an object store will do. Of any number
of processes that find one dead owner, one creates the file named after it; and whoever creates it
too late finds the claim itself gone, and leaves it. The last one removes the folder.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import LockError, StoreError
from pipeline.locking.exclusive import create_exclusively
from pipeline.locking.owners import BEATS, Owner, Witness
from pipeline.storage import (
    is_local,
    read_small,
    remove_file,
    remove_folder,
    scratch_folder,
    write_bytes,
)

LOCKS = "locks"
_GATE = "gate"
_OWNER = ".json"
_TOKEN_BYTES = 16  # in hex; an owner ends in a newline
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 2.0


@contextmanager
def occupy(
    folder: Path,
    purpose: str,
    shared: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    otherwise: str = "",
) -> Iterator["Occupant"]:
    """Work in a folder, alone or beside others that share it too.

    Args:
        folder: of a cache or a run, which may not be there yet.
        purpose: the command, for whoever is refused because of it.
        shared: whether others may work beside this one, if they share too.
        tell: given one line for each dead process whose place is taken.
        otherwise: what to do instead of waiting, where the same command is at work there.

    Raises:
        LockError: somebody else is at work there, or the folder cannot be written.
    """
    owner = Owner(secrets.token_hex(_TOKEN_BYTES // 2), purpose, shared)
    occupant = Occupant(folder, owner, tell, otherwise)
    try:
        occupant.enter()
        yield occupant
    finally:
        occupant.leave()


class Occupant:
    """This process at work in a folder.

    Attributes:
        folder: the folder.
        owner: this process.
        tell: given one line of what the user should know.
    """

    def __init__(
        self, folder: Path, owner: Owner, tell: Callable[[str], object], otherwise: str = ""
    ) -> None:
        self.folder = folder
        self.owner = owner
        self.tell = tell
        self._otherwise = otherwise
        self._locks = folder / LOCKS
        self._witness = Witness()
        self._told: set[str] = set()
        self._alone = False  # then nothing needs to be claimed
        self._writing = threading.Lock()
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="stillroom-heartbeat", daemon=True)

    def enter(self) -> None:
        """Wait at the gate, then begin; see `occupy`."""
        try:
            create_exclusively(self._file, self.owner.dump())
            self._heart.start()
            with self.hold(_GATE):
                others = self._find_others()
                rivals = [other for other in others if not (self.owner.shared and other.shared)]
                if rivals:
                    raise self._refuse(rivals[0])
                if not others:
                    self._sweep()
                self._write(admitted=True)
            self._alone = not self.owner.shared
        except OSError as error:
            raise LockError(
                f"{self._locks}: cannot be written ({error.strerror or error}); nothing was"
                " changed, see to the folder and run the same command again"
            ) from error

    def leave(self) -> None:
        """Give everything back, and remove the folder if nobody else is there."""
        self._alone = False
        self._leaving.set()
        if self._heart.ident is not None:
            self._heart.join()
        with suppress(OSError, LockError, StoreError):
            if self._file.is_file():
                self._write(admitted=False)
                with self.hold(_GATE):
                    if not self._find_others(waiting=False):
                        self._sweep()
        with suppress(OSError, StoreError):
            remove_file(self._file)
            remove_folder(self._locks)

    def claim(self, name: str) -> bool:
        """Take a piece of work; False where somebody has it who lives, or may."""
        if self._alone:
            return True
        while True:
            chain = self._follow(name)
            last = chain[-1] if chain else None
            if last == self.owner.token:
                return True
            if last is not None and not self._has_died(last):
                return False
            mine = self._locks / (name if last is None else f"{name}.{last}")
            if not create_exclusively(mine, self.owner.token.encode()):
                continue
            if last is None or self._follow(name)[-1:] == [self.owner.token]:
                return True
            remove_file(mine)  # its owner was gone before we came

    def release(self, name: str) -> None:
        """Give a piece of work back, unless it was taken over."""
        if self._alone:
            return
        chain = self._follow(name)
        if chain[-1:] != [self.owner.token]:
            return
        for end in ("", *(f".{token}" for token in chain[:-1])):  # free from the first one on
            remove_file(self._locks / f"{name}{end}")

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Wait for a piece of work, and give it back at the end of the block."""
        pauses = lengthen_pauses()
        while not self.claim(name):
            time.sleep(next(pauses))
        try:
            yield
        finally:
            self.release(name)

    def require(self, name: str | None = None) -> None:
        """Make sure that nobody took this process for dead.

        Args:
            name: of a piece of work that it has claimed.

        Raises:
            LockError: somebody did, and may be at the same work.
        """
        lost = not self._file.is_file()
        if name is not None and not self._alone:
            lost = lost or self._follow(name)[-1:] != [self.owner.token]
        if lost:
            raise LockError(
                f"{self.folder}: was taken over by another process, or removed, while this one gave"
                " no sign of life; what is finished is safe, run the same command again to continue"
            )

    @property
    def scratch(self) -> Path:
        """A file of this process alone, which goes with the folder at the latest."""
        folder = self._locks if is_local(self.folder) else scratch_folder(self.folder)
        return folder / f"{self.owner.token}.arrow"

    @property
    def _file(self) -> Path:
        return self._locks / (self.owner.token + _OWNER)

    def _write(self, **changes: bool) -> None:
        with self._writing:
            self.owner = self.owner.alive(**changes)
            write_bytes(self._file, self.owner.dump())

    def _beat(self) -> None:
        while not self._leaving.wait(self.owner.patience / BEATS):
            with suppress(OSError, StoreError):  # the disk, or the store, may come back
                if self._file.is_file():
                    self._write()

    def _follow(self, name: str) -> list[str]:
        """Who claimed a piece of work, and then who took it over from whom."""
        chain: list[str] = []
        file = self._locks / name
        while (token := _read(file)) is not None:
            chain.append(token.decode())
            file = self._locks / f"{name}.{chain[-1]}"
        return chain

    def _has_died(self, token: str) -> bool:
        content = _read(self._locks / (token + _OWNER))
        if not token:  # just created, on a disk without links; or left so for ever
            return self._witness.hears(token, 0, self.owner.patience) is False
        owner = None if content is None else Owner.parse(content)
        if owner is None:
            return True
        dead = self._witness.is_alive(owner) is False
        if dead:
            self._tell_of(owner)
        return dead

    def _find_others(self, waiting: bool = True) -> list[Owner]:
        """Who else is admitted and lives.

        Args:
            waiting: for a sign of life of those that may be dead; else they count as living.
        """
        found, pauses = [], lengthen_pauses()
        for file in self._locks.iterdir():
            is_other = file.name.endswith(_OWNER) and file.name != self._file.name
            while is_other and (content := _read(file)) is not None:
                owner = Owner.parse(content)
                if owner is None or not owner.admitted:
                    break
                alive = self._witness.is_alive(owner)
                if alive is None and waiting:
                    self._tell_of(owner, f"is listened for, up to {owner.patience:.0f} s")
                    time.sleep(next(pauses))
                    continue
                if alive is False:
                    self._tell_of(owner)
                    remove_file(file)
                else:
                    found.append(owner)
                break
        return found

    def _sweep(self) -> None:
        """Remove what dead processes left; only while nobody else is admitted."""
        gate = {_GATE, *(f"{_GATE}.{token}" for token in self._follow(_GATE))}
        for file in list(self._locks.iterdir()):
            if file.name == self._file.name or file.name in gate:
                continue
            content = _read(file) if file.name.endswith(_OWNER) else None
            owner = None if content is None else Owner.parse(content)
            if owner is None or self._witness.is_alive(owner) is False:
                remove_file(file)

    def _tell_of(self, owner: Owner, what: str = "") -> None:
        line = f"{self.folder}: {owner}, at work since {owner.since}, "
        line += what or "has died; its place is taken over"
        if line not in self._told:
            self._told.add(line)
            self.tell(line)

    def _refuse(self, owner: Owner) -> LockError:
        way = "wait until it has ended"
        if self._otherwise and owner.purpose == self.owner.purpose:
            way += f", or {self._otherwise}"
        return LockError(
            f"{self.folder}: {owner} has been at work there since {owner.since}; {way}"
        )


def lengthen_pauses() -> Iterator[float]:
    """Seconds between two looks: few at first, more for whoever waits long."""
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(_LONGEST_PAUSE, pause * 1.5)


def _read(file: Path) -> bytes | None:
    """What a file of the folder says, None where it is not there; of a store by one request, unless
    it comes torn."""
    try:
        content = read_small(file)
        whole = len(content) == _TOKEN_BYTES or content.endswith(b"\n")
        return content if whole else file.read_bytes()
    except FileNotFoundError:
        return None
