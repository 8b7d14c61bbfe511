"""Some examples of a cache as a view: by id, split, columns or number, or by what was said of them.

cache -> rows that are wanted, ascending -> select_rows -> view.json
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.cache import RowRuns, TeacherCache, select_rows, write_view
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.examples import CachedExample
from pipeline.targets import UNLABELLED
from stages.progress import RowProgress


@dataclass(frozen=True)
class Choice:
    """Which examples are taken; one must meet all that is given.

    Attributes:
        ids: a file of example ids, one per line.
        split: train, validation or test.
        where: column -> values, as text, of which the example's is one; several in one text with
            commas between, unless that is a value itself.
        every: of those left, each n-th.
        first: of those left, the first so many.
    """

    ids: Path | None = None
    split: str | None = None
    where: Mapping[str, Sequence[str]] | None = None
    every: int = 1
    first: int | None = None


@dataclass(frozen=True)
class Bounds:
    """What an example must lie between, ends included; infinite where nobody asks.

    Attributes:
        kept_mass: mean probability of the kept classes together, over its targets.
        entropy: mean entropy of the teacher in nats, as `SparseDistribution.entropy` knows it.
        loss: mean of the teacher's -log p(label) in nats, over its labelled targets.
        tokens: its length.
    """

    kept_mass: tuple[float, float] | None = None
    entropy: tuple[float, float] | None = None
    loss: tuple[float, float] | None = None
    tokens: tuple[float, float] | None = None

    @property
    def asked(self) -> dict[str, tuple[float, float]]:
        """The bounds that were given, by the name of what they bound."""
        return {name: bounds for name, bounds in vars(self).items() if bounds is not None}


def select(cache_path: Path, output: Path, choice: Choice, console: Console | None = None) -> int:
    """Write a view of some examples of a cache and return how many it has.

    Raises:
        StillroomError: no such cache, split, column or id, or nothing is left.
    """
    cache = TeacherCache.open(cache_path)
    chosen = np.ones(len(cache), dtype=bool)
    if choice.split is not None:
        chosen &= _mark(cache, cache.split_indices(choice.split))
    for column, values in (choice.where or {}).items():
        chosen &= _mark(cache, *_find_values(cache, column, values))
    if choice.ids is not None:
        chosen &= _mark(cache, _find_ids(cache, choice.ids))
    rows = np.flatnonzero(chosen)[:: choice.every][: choice.first]
    return _write(cache, output, rows, console)


def filter_cache(
    cache_path: Path, output: Path, bounds: Bounds, console: Console | None = None
) -> int:
    """Write a view of the examples whose targets are as asked and return how many there are.

    Raises:
        StillroomError: no such cache, no bounds, or nothing is left.
    """
    asked = bounds.asked
    if not asked:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in MEASURES)
        raise ConfigError(f"filter: no bounds were given; give one or more of {options}")
    cache = TeacherCache.open(cache_path)
    measured = {name: np.full(len(cache), np.nan) for name in asked}
    with RowProgress(Console(stderr=True), "reading", len(cache)) as bar:
        for row in range(len(cache)):
            example = cache[row]
            for name, values in measured.items():
                values[row] = MEASURES[name](example)
            bar.advance(row + 1)
    between = [
        (low <= measured[name]) & (measured[name] <= high) for name, (low, high) in asked.items()
    ]
    rows = np.flatnonzero(np.logical_and.reduce(between))
    return _write(cache, output, rows, console, _tell_ranges(measured))


def _tell_ranges(measured: Mapping[str, np.ndarray]) -> str:
    """`; entropy is 1.2 to 3.4, ...` of what was measured."""
    told = []
    for name, values in measured.items():
        known = values[~np.isnan(values)]
        span = f"{known.min():.4g} to {known.max():.4g}" if len(known) else "known of none"
        told.append(f"{name.replace('_', ' ')} is {span}")
    return f"; {', '.join(told)}"


def parse_where(given: Iterable[str]) -> dict[str, list[str]]:
    """`column=value,value` of the command line; which commas belong to a value the column tells.

    Raises:
        ConfigError: no such pair.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        column, separator, values = text.partition("=")
        if not separator or not column:
            raise ConfigError(f"--where {text}: expected column=value, or column=value,value")
        found.setdefault(column, []).append(values)
    return found


def parse_range(option: str, text: str | None) -> tuple[float, float] | None:
    """`LOW:HIGH` of the command line; either may be left out.

    Raises:
        ConfigError: no such pair.
    """
    if text is None:
        return None
    low, separator, high = text.partition(":")
    try:
        found = float(low or -math.inf), float(high or math.inf)
    except ValueError:
        separator = ""
    if not separator or math.isnan(sum(found)) or found[0] > found[1]:
        raise ConfigError(f"{option} {text}: expected LOW:HIGH, for instance 0.5:2 or 0.5:")
    return found


def _measure_mass(example: CachedExample) -> float:
    return float(1.0 - example.targets.at(1.0).tail_mass.double().mean())


def _measure_entropy(example: CachedExample) -> float:
    return float(example.targets.at(1.0).entropy().double().mean())


def _measure_loss(example: CachedExample) -> float:
    labelled = example.targets.label_ids != UNLABELLED
    return float(-example.targets.label_log_probs[labelled].double().mean())


def _measure_tokens(example: CachedExample) -> float:
    return len(example.input_ids)


# Without a target, or a label, a mean is NaN, which lies between no bounds.
MEASURES: dict[str, Callable[[CachedExample], float]] = {
    "kept_mass": _measure_mass,
    "entropy": _measure_entropy,
    "loss": _measure_loss,
    "tokens": _measure_tokens,
}


def _mark(cache: TeacherCache, *rows: RowRuns | np.ndarray) -> np.ndarray:
    marked = np.zeros(len(cache), dtype=bool)
    for some in rows:
        marked[np.asarray(some, dtype=np.int64)] = True
    return marked


def _find_values(cache: TeacherCache, column: str, values: Sequence[str]) -> list[RowRuns]:
    groups = cache.group(column)
    wanted = [v for text in values for v in ([text] if text in groups else text.split(","))]
    for value in wanted:
        if value not in groups:
            raise DataError(
                f"{cache.path}: no example has {column} {value!r}{did_you_mean(value, groups)}"
            )
    return [groups[value] for value in wanted]


def _find_ids(cache: TeacherCache, file: Path) -> np.ndarray:
    try:
        wanted = file.read_text(encoding="utf-8-sig").split("\n")  # ids may hold other breaks
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give a file of ids by line") from error
    rows = []
    for example_id in filter(None, (line.removesuffix("\r") for line in wanted)):
        row = cache.find_row(example_id)
        if row is None:
            raise DataError(
                f"{file}: {cache.path} has no example {example_id!r}; give ids of that cache"
            )
        rows.append(row)
    return np.array(rows, dtype=np.int64)


def _write(
    cache: TeacherCache, output: Path, rows: np.ndarray, console: Console | None, found: str = ""
) -> int:
    if not len(rows):
        raise DataError(f"{cache.path}: no example is left of {len(cache):,}{found}; ask for less")
    view = write_view(output, select_rows(cache, RowRuns.of(rows)))
    console = console or Console()
    console.print(
        f"{output}: a view of {len(view):,} of {len(cache):,} examples of {cache.path}",
        soft_wrap=True,
    )
    return len(view)
