"""Trials of one scene: stopped in some way, started again until it ends, and looked at.

Scene -- uninterrupted --> what must come of it
point -- start, SIGKILL or errno there, start again, ... --> the same bytes, or a loss
"""

import gc
import importlib
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

from few_files import few_files
from torture_faults import FAULTS, fail_from, harmless, kill_at, slow_down
from torture_power import find_unsafe
from torture_scenes import Scene, find_litter
from torture_syscalls import Ended, Judge, Operation, Verdict, supervise

_MOST_STOPS = 12
_AGAIN = 0.9  # how often what was stopped is stopped again when it goes on
_STARVED = 0.05  # how many stops are too many open files, in earnest
_SPARE_FILES = 7
_SLOWEST, _SLOW_SECONDS = 0.02, 2.0  # of a pause at each operation; of all of them
_KILLS = 0.6  # the other stops are errors of the disk


@dataclass
class Report:
    """What was tried on a scene, and what went wrong.

    Attributes:
        name: of the scene.
        enumerated, random: kills at a chosen operation, at a time.
        faults: errors that were injected, by name.
        losses: one line each: bytes that differ, work done twice, litter, errors told badly.
    """

    name: str
    enumerated: int = 0
    random: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        """All stops."""
        return self.enumerated + self.random + sum(self.faults.values())

    def __str__(self) -> str:
        kills = self.enumerated + self.random
        faults = ", ".join(f"{name} {count}" for name, count in self.faults.items())
        return (
            f"torture: {self.name}: {kills} kill points ({self.enumerated} enumerated,"
            f" {self.random} random), {sum(self.faults.values())} errors ({faults}),"
            f" {len(self.losses)} losses"
        )


class Rack:
    """One scene, its uninterrupted result, and trials of it."""

    def __init__(
        self, scene: Scene, log: Path, rng: random.Random, watched: bool, timed: float
    ) -> None:
        self.scene, self._timed = scene, timed
        self.report = Report(scene.name)
        self._log, self._rng, self._watched = log, rng, watched
        self._faults = [name for name in FAULTS if name != "ENOENT" or not scene.follow_up]
        self._warm()
        self.operations: list[Operation] = []
        self._clear()
        ended = self._start(self._note)
        self._seconds = ended.seconds
        if not ended.done or not self._follow_up().done:
            raise RuntimeError(f"{scene.name}: does not run uninterrupted: {self._log.read_text()}")
        self._how = ["uninterrupted"]
        self._expected = scene.content(scene.output)
        if litter := find_litter(scene.output):
            self._lose(f"leaves {', '.join(litter)}")
        for line in find_unsafe(self.operations, scene.output):
            self._lose(f"a power cut would show that {line}")

    def try_some(self, points: int) -> None:
        """Stop the command somewhere, again and again, at so many points at least."""
        while self.report.points < points:
            self._try(self._stop_somehow)

    def try_all(self) -> None:
        """Kill at every operation, and let each fail in a way that it can; what goes on then is
        stopped somewhere else."""
        for point, operation in enumerate(self.operations):
            self._try(partial(self._kill_at, point))
            fitting = [name for name in self._faults if operation.kind in FAULTS[name]]
            if fitting:
                self._try(partial(self._break_at, self._rng.choice(fitting), point))

    def try_slow(self) -> None:
        """Let the disk take its time, and have somebody else begin where the work is half done."""
        self._clear()
        self._how = ["on a slow disk"]
        pause = min(_SLOWEST, _SLOW_SECONDS / len(self.operations))
        ended = self._start(slow_down(pause, len(self.operations) // 2, self._intrude))
        if not ended.done or "has died" in ended.text:
            self._lose(f"exit {ended.code}, {_end_of(ended)}")
        self._finish()

    def _intrude(self) -> None:
        """Begin the same command beside one that waits for its disk; it is not taken for dead."""
        if self.scene.alone:
            ended = supervise(self._act, self._log.with_name("intruder"))
            if ended.code != 1 or "has been at work there since" not in ended.text:
                self._lose(f"lets another one in: exit {ended.code}, {_end_of(ended)}")

    def _try(self, stop: Callable[[], Ended]) -> None:
        self._clear()
        self._how = []
        ended = stop()
        while not ended.done and len(self._how) < _MOST_STOPS and self._rng.random() < _AGAIN:
            ended = self._stop_somehow()
        self._finish()

    def _stop_somehow(self) -> Ended:
        if not self._watched or self._rng.random() < self._timed:
            return self._kill_within(self._seconds)
        if self._rng.random() < _STARVED:
            return self._starve(self._rng.randrange(_SPARE_FILES))
        point = int(len(self.operations) * self._rng.random() ** 2)
        if self._rng.random() < _KILLS:
            return self._kill_at(point)
        return self._break_at(self._rng.choice(self._faults), point)

    def _kill_within(self, seconds: float) -> Ended:
        after = self._rng.random() * seconds
        self._how.append(f"killed after {after:.3f} s")
        ended = self._start(None, after)
        self.report.random += ended.killed
        return ended

    def _kill_at(self, point: int) -> Ended:
        self._how.append(f"killed at operation {point}")
        ended = self._start(kill_at(point, tear=self._rng.random() < 0.5))
        self.report.enumerated += ended.killed
        return ended

    def _break_at(self, name: str, point: int) -> Ended:
        self._how.append(f"{name} from operation {point} on")
        judge = fail_from(point, name, self.scene.output)
        ended = self._start(judge, vanishes=name == "ENOENT")
        self.report.faults[name] = self.report.faults.get(name, 0) + 1
        self._check_error(ended)
        return ended

    def _starve(self, spare: int) -> Ended:
        """Allow so many open files more than are open."""
        self._how.append(f"{spare} files more")

        def act() -> None:
            with few_files(spare):
                self._act()

        ended = self._start(harmless, act=act)
        self.report.faults["ulimit -n"] = self.report.faults.get("ulimit -n", 0) + 1
        self._check_error(ended)
        if not ended.done and "(ulimit -n)" not in ended.text:
            self._lose(f"does not name the limit: {_end_of(ended)}")
        return ended

    def _check_error(self, ended: Ended) -> None:
        """An error is one line that says what is safe and how to continue."""
        if ended.done:
            return
        told = [line for line in ended.text.splitlines() if line.startswith("error: ")]
        if ended.code != 1 or len(told) != 1 or "Traceback" in ended.text:
            self._lose(f"exit {ended.code}, {_end_of(ended)}")
        elif "again" not in told[0]:
            self._lose(f"does not say how to continue: {told[0]}")

    def _finish(self) -> None:
        """Let the command run to its end; all must be as if nothing had happened."""
        scene, promise = self.scene, self.scene.promise(self.scene.output)
        ended = self._start(harmless)
        text = " ".join(ended.text.split())
        if ended.done:
            ended = self._follow_up()
        if not ended.done:
            self._lose(f"does not continue: {_end_of(ended)}")
            return
        if promise not in text:
            self._lose(f"does not say that it {promise}: {text}")
        found, expected = scene.content(scene.output), self._expected
        wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
        if wrong:
            told = [f"{name}: {find_difference(found, expected, name)}" for name in sorted(wrong)]
            self._lose(f"other bytes: {'; '.join(told)}")
        if litter := find_litter(scene.output):
            self._lose(f"leaves {', '.join(litter)}")

    def _lose(self, what: str) -> None:
        self.report.losses.append(f"{self.scene.name}, {', then '.join(self._how)}: {what}")

    def _follow_up(self) -> Ended:
        """Run what comes after the command itself; the last of it."""
        ended = Ended(0, "")
        for command in self.scene.follow_up:
            ended = supervise(partial(self._act, command), self._log)
        return ended

    def _start(
        self,
        judge: Judge | None,
        kill_after: float | None = None,
        act: Callable[[], None] | None = None,
        vanishes: bool = False,
    ) -> Ended:
        before = {} if vanishes else self.scene.treasures(self.scene.output)
        judge = judge if self._watched else None
        ended = supervise(act or self._act, self._log, judge, self.scene.output, kill_after)
        if self.scene.stands and self.scene.stands in " ".join(ended.text.split()):
            ended.code = 0
        after = self.scene.treasures(self.scene.output)
        for name in before:
            if after.get(name, before[name]) != before[name]:
                self._lose(f"{name} was finished and is made again")
        return ended

    def _act(self, command: Sequence[str] = ()) -> None:
        sys.argv = ["stillroom", *(command or self.scene.command)]
        importlib.import_module("stages.cli").main()

    def _note(self, operation: Operation) -> Verdict:
        self.operations.append(operation)
        return harmless(operation)

    def _clear(self) -> None:
        self.scene.prepare(self.scene.output)

    def _warm(self) -> None:
        """Import what the command imports, so that no start pays for it."""
        names = self._log.with_name("modules")

        def act() -> None:
            try:
                self._act()
            finally:
                names.write_text("\n".join(sys.modules), encoding="utf-8")

        self._clear()
        supervise(act, self._log)
        for name in names.read_text(encoding="utf-8").splitlines():
            with suppress(Exception):  # some are made, not imported
                importlib.import_module(name)
        gc.freeze()  # a child that collects garbage would copy all of it


def find_difference(found: dict[str, bytes], expected: dict[str, bytes], name: str) -> str:
    """The first line of a file that is another one than it should be."""
    if name not in found or name not in expected:
        return "is missing" if name in expected else "is there"
    one, other = (content[name].splitlines() for content in (found, expected))
    pairs = enumerate(zip_longest(one, other), start=1)
    number, (is_, was) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
    return f"line {number} is {is_!r:.300}, not {was!r:.300}"


def _end_of(ended: Ended) -> str:
    return " | ".join(ended.text.splitlines()[-3:])
