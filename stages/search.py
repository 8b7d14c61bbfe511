"""Which settings a sweep tries: every combination of a grid, or what Optuna proposes.

    --grid key=a,b  ->  Grid          --search key=low:high[:log]  ->  Search (extra `sweep`)

Both propose settings until there is nothing left, and are told what came of them.
"""

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import parse_value
from pipeline.errors import ConfigError
from pipeline.metrics import Metric


@dataclass(frozen=True)
class Proposal:
    """Settings to try; `trial` is Optuna's own."""

    settings: Mapping[str, Any]
    trial: Any = None


class Proposer(ABC):
    """Where settings come from. Safe to be asked by several threads."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._lock = threading.Lock()
        self._told: dict[Path, None] = {}

    @abstractmethod
    def samples(self) -> Iterator[Mapping[str, Any]]:
        """Settings that show whether the keys and values fit the config."""

    @abstractmethod
    def propose(self) -> Proposal | None:
        """The next settings; None where there are no more."""

    def tell(self, proposal: Proposal, run: Path, metric: Metric | None) -> None:
        """Say what came of a proposal: its run, and the metric, None where it failed."""
        with self._lock:
            self._told[run] = None

    def recall(self, settings: Mapping[str, Any], run: Path, metric: Metric) -> None:
        """Say what an earlier sweep found."""
        return

    def told(self) -> list[Path]:
        """The runs of this sweep, in the order in which they ended."""
        return list(self._told)

    def read(self, config: Any) -> dict[str, Any] | None:
        """These settings as a run's config has them, None where it lacks one."""
        found = {}
        for key in self._keys:
            here = config
            for part in key.split("."):
                try:
                    here = here[int(part)] if isinstance(here, list) else here[part]
                except (KeyError, IndexError, TypeError, ValueError):
                    return None
            found[key] = here
        return found


class Grid(Proposer):
    """Every combination of the values of each key, the last key varying fastest."""

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(list(values))
        self._all = [
            dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
        ]
        self._left = iter(self._all)

    def samples(self) -> Iterator[Mapping[str, Any]]:
        """All of them."""
        return iter(self._all)

    def propose(self) -> Proposal | None:
        """The next combination."""
        with self._lock:
            settings = next(self._left, None)
        return None if settings is None else Proposal(settings)


@dataclass(frozen=True)
class Range:
    """Where a search looks for one setting.

    Attributes:
        low, high: the bounds; whole numbers where both are.
        log: look evenly in the logarithm.
        choices: any of these instead.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def distribution(self, optuna: Any) -> Any:
        """The same as Optuna says it."""
        if self.choices:
            return optuna.distributions.CategoricalDistribution(self.choices)
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        kind = "IntDistribution" if whole else "FloatDistribution"
        return getattr(optuna.distributions, kind)(self.low, self.high, log=self.log)


class Search(Proposer):
    """What Optuna's tree-structured Parzen estimator proposes (Bergstra et al. 2011).

    Numbers are rounded to four digits, so that a run's name tells them exactly.
    """

    def __init__(self, ranges: Mapping[str, Range], trials: int, seed: int, parallel: bool) -> None:
        """Begin without any finding.

        Raises:
            ConfigError: Optuna is not installed, or a range is empty.
        """
        super().__init__(list(ranges))
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                '--search needs optuna; pip install "stillroom[sweep]", or give --grid'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._ranges, self._left = optuna, ranges, trials
        self._distributions = {k: r.distribution(optuna) for k, r in ranges.items()}
        self._seed, self._parallel = seed, parallel
        self._study = optuna.create_study(sampler=self._sampler())  # the least is the best

    def _sampler(self) -> Any:
        """One that does not begin as those before it did, where a search goes on."""
        seed = self._seed + len(self._told)
        return self._optuna.samplers.TPESampler(seed=seed, constant_liar=self._parallel)

    def samples(self) -> Iterator[Mapping[str, Any]]:
        """The lower bounds and the upper ones; every choice of the others."""
        longest = max(len(r.choices) or 2 for r in self._ranges.values())
        for n in range(longest):
            yield {
                key: r.choices[n % len(r.choices)] if r.choices else (r.low, r.high)[n % 2]
                for key, r in self._ranges.items()
            }

    def propose(self) -> Proposal | None:
        """What Optuna would try next."""
        with self._lock:
            if self._left <= 0:
                return None
            self._left -= 1
            trial = self._study.ask(self._distributions)
        return Proposal({key: _round(value) for key, value in trial.params.items()}, trial)

    def tell(self, proposal: Proposal, run: Path, metric: Metric | None) -> None:
        """See `Proposer.tell`; a run that failed says nothing about its neighbours."""
        super().tell(proposal, run, metric)
        failed = self._optuna.trial.TrialState.FAIL
        with self._lock:
            if metric is None:
                self._study.tell(proposal.trial, state=failed)
            else:
                self._study.tell(proposal.trial, _cost(metric))

    def recall(self, settings: Mapping[str, Any], run: Path, metric: Metric) -> None:
        """Count a run of an earlier search among the trials."""
        trial = self._optuna.trial.create_trial(
            params=dict(settings), distributions=self._distributions, value=_cost(metric)
        )
        with self._lock:
            self._study.add_trial(trial)
            self._told[run] = None
            self._left -= 1
            self._study.sampler = self._sampler()


def make_proposer(
    grid: Sequence[str], search: Sequence[str], trials: int, seed: int, parallel: bool
) -> Proposer:
    """What the options of the command line ask for.

    Raises:
        ConfigError: both a grid and a search, none of them, or one that cannot be read.
    """
    if bool(grid) == bool(search):
        raise ConfigError("sweep: give --grid KEY=A,B or --search KEY=LOW:HIGH, one of the two")
    if grid:
        return Grid(parse_grid(grid))
    return Search(parse_ranges(search), trials, seed, parallel)


def parse_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """`key=a,b` (or `key=[a, [b, c]]` for values with commas) -> the values of each key.

    Raises:
        ConfigError: one without a key or a value, or a key twice.
    """
    found: dict[str, list[Any]] = {}
    for option in options:
        key, text = _split(option, "--grid", "key=value,value", found)
        values = parse_value(text) if text.startswith("[") else None
        if not isinstance(values, list):
            values = [parse_value(part) for part in text.split(",")]
        found[key] = values
    return found


def parse_ranges(options: Sequence[str]) -> dict[str, Range]:
    """`key=low:high`, `key=low:high:log` or `key=a,b` -> where to look for each key.

    Raises:
        ConfigError: no such range, or a key twice.
    """
    found: dict[str, Range] = {}
    for option in options:
        key, text = _split(option, "--search", "key=low:high, key=low:high:log or key=a,b", found)
        low, colon, rest = text.partition(":")
        if not colon:
            found[key] = Range(choices=tuple(parse_value(part) for part in text.split(",")))
            continue
        high, _, scale = rest.partition(":")
        bounds = parse_value(low), parse_value(high)
        numbers = all(isinstance(b, int | float) and not isinstance(b, bool) for b in bounds)
        log = scale == "log"
        if not numbers or scale not in ("", "log") or not bounds[0] < bounds[1]:
            raise ConfigError(
                f"--search {option}: expected two rising numbers, key=low:high or key=low:high:log"
            )
        if log and bounds[0] <= 0:
            raise ConfigError(f"--search {option}: a logarithm needs a low above 0")
        found[key] = Range(*bounds, log=log)
    return found


def _split(option: str, name: str, form: str, known: Mapping[str, Any]) -> tuple[str, str]:
    key, separator, text = option.partition("=")
    if not (key and separator and text):
        raise ConfigError(f"{name} {option}: expected {form}")
    if key in known:
        raise ConfigError(f"{name} {option}: {key} is varied twice; give all its values at once")
    return key, text


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cost(metric: Metric) -> float:
    return -metric.value if metric.direction == "higher" else metric.value
