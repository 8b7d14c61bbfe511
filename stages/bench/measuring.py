"""Sides of a ratio measured in turn, and the table they end up in.

    {side: run} -- interleave --> {side: [seconds]} -- rate_row, time_row --> Row -- show --> table

What disturbs a machine for a while then disturbs both sides, and the ratio survives it.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from stages.bench.judging import judge

Seconds = list[float]

_PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "zarr", "numpy")


@dataclass(frozen=True)
class Row:
    """One measurement and what it is held against.

    Attributes:
        what, unit: of the measurement.
        measured: the median over the repetitions, or a number computed from such.
        baseline: the same of the other side, None where there is none.
        against: what the other side is.
        repetitions: of each side, warm-up not counted; 0 for what does not vary.
        spread: lowest and highest ratio of a single repetition; None where nothing is repeated.
        goal: what the ratio, or where it has a unit the measurement, should come to.
    """

    what: str
    unit: str
    measured: float
    baseline: float | None = None
    against: str = ""
    repetitions: int = 0
    spread: tuple[float, float] | None = None
    goal: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured over baseline."""
        return None if self.baseline is None else self.measured / self.baseline

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None where there is none."""
        return judge(self.goal, self.unit, self.measured, self.ratio)

    def to_json(self) -> dict[str, Any]:
        """Every field, the ratio, and whether the goal is reached."""
        return {**asdict(self), "ratio": self.ratio, "reached": self.reached}


def interleave(sides: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, Seconds]:
    """Run every side once to warm up, then all in turn, again and again.

    Args:
        sides: name -> one run, which returns the seconds of what it measures.
        repetitions: rounds that count.
    """
    for run in sides.values():
        run()
    found: dict[str, Seconds] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, run in sides.items():
            found[name].append(run())
    return found


def rate_row(
    what: str, count: int, ours: Seconds, against: str, theirs: Seconds, goal: str = ""
) -> Row:
    """Tokens per second of two sides that go through the same `count` tokens."""
    return Row(
        what=what,
        unit="tokens/s",
        measured=count / median(ours),
        baseline=count / median(theirs),
        against=against,
        repetitions=len(ours),
        spread=_spread(theirs, ours),
        goal=goal,
    )


def time_row(
    what: str,
    unit: str,
    per_second: float,
    ours: Seconds,
    against: str,
    theirs: Seconds,
    goal: str = "",
) -> Row:
    """Times of two sides in a unit of which a second has `per_second`."""
    return Row(
        what=what,
        unit=unit,
        measured=per_second * median(ours),
        baseline=per_second * median(theirs),
        against=against,
        repetitions=len(ours),
        spread=_spread(ours, theirs),
        goal=goal,
    )


def stopwatch(run: Callable[[], None]) -> float:
    """Seconds of one run, work on the device included."""
    finish_device_work()
    began = time.perf_counter()
    run()
    finish_device_work()
    return time.perf_counter() - began


def run_through(work: Iterable[Any]) -> float:
    """Seconds to take everything that an iterable gives."""
    began = time.perf_counter()
    for _ in work:
        pass
    return time.perf_counter() - began


def join_batches(
    examples: Iterable[Any], size: int, collate: Callable[[list[Any]], Any]
) -> Iterator[Any]:
    """Collate each `size` examples, and those that are left."""
    rest = iter(examples)
    while batch := list(islice(rest, size)):
        yield collate(batch)


def finish_device_work() -> None:
    """Wait for the GPU, where there is one: what was only started has not been done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_machine() -> dict[str, Any]:
    """What a time depends on besides the code; `load` is the load average of the last minute."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def show_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print the table: what, measured, its baseline beside it, and their ratio.

    A letter names the baseline, which is explained below the table; below the ratio stand its
    lowest and highest value in a single repetition, below a goal whether it is reached; n is the
    number of repetitions.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    for heading in ("measured", "baseline", "ratio", "goal", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    baselines = list(dict.fromkeys(row.against for row in rows if row.against))
    letters = dict(zip(baselines, ascii_lowercase, strict=False))
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        last = after is None or after.unit != row.unit
        baseline = ""
        if row.baseline is not None:
            baseline = f"{_format(row.baseline)} {letters.get(row.against, '')}"
        runs = str(row.repetitions or "")
        verdict = {None: "", True: "\nreached", False: "\nmissed"}[row.reached]
        cells = (_format(row.measured), baseline, _ratio(row), row.goal + verdict, runs)
        table.add_row(f"{row.what}, {row.unit}", *cells, end_section=last)
    console.print(table)
    for baseline, letter in letters.items():
        console.print(f"{letter}  {baseline}", markup=False)


def show_columns(columns: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print bytes per token: one column for each cache, one row for each of its columns."""
    title = "bytes per token, by column"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("column", no_wrap=True)
    for name in columns:
        table.add_column(name.replace(": ", "\n"), justify="right")
    for name in dict.fromkeys(name for sizes in columns.values() for name in sizes):
        cells = [f"{sizes[name]:.2f}" if name in sizes else "" for sizes in columns.values()]
        table.add_row(name, *cells)
    totals = [f"{sum(sizes.values()):.2f}" for sizes in columns.values()]
    table.add_section()
    table.add_row("sum", *totals)
    console.print(table)


def _spread(above: Seconds, below: Seconds) -> tuple[float, float]:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return min(ratios), max(ratios)


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    spread = f"\n{_format(row.spread[0])}-{_format(row.spread[1])}" if row.spread else ""
    return _format(row.ratio) + spread


def _processor() -> str:
    """The name of the CPU, as the system tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
