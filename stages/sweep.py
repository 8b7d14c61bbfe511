"""Train one config under many settings, in parallel from one cache, and compare the students.

    --grid / --search -> settings of each run -> students -> <output>/<settings> -> compare

A run's folder is named by its settings, so a sweep that is started again keeps what is finished.
"""

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pipeline.cache import TeacherCache
from pipeline.config import load_config
from pipeline.errors import ConfigError, StillroomError, did_you_mean
from pipeline.identity import digest_json
from pipeline.lineage import describe_cache
from pipeline.metrics import Metric
from pipeline.resuming import is_finished
from pipeline.runs import read_result
from stages.compare import compare
from stages.search import Proposer
from stages.train_student import StudentConfig, train_student

_LONGEST_NAME = 120  # of a folder, in characters


@dataclass(frozen=True)
class Sweep:
    """What is varied, and how it is run.

    Attributes:
        config: the file of the student's config.
        overrides: `section.key=value` that all runs share.
        metric, slice: what the runs are ordered by, and a search looks for.
        jobs: runs at a time; of several, each is a process with its share of the processors and
            says what it has to say in train.log.
        console: where progress is told.
    """

    config: Path
    overrides: Sequence[str] = ()
    metric: str = "loss"
    slice: str = "all"
    jobs: int = 1
    console: Console = field(default_factory=Console)

    def student(self, settings: Mapping[str, Any] | None = None) -> StudentConfig:
        """The config of one run, or of all where there are no settings.

        Raises:
            ConfigError: a setting does not exist or does not fit.
        """
        if settings is None:
            return load_config(StudentConfig, self.config, self.overrides)
        return load_config(StudentConfig, self.config, self.settings_of(settings))

    def settings_of(self, settings: Mapping[str, Any]) -> list[str]:
        """All overrides of one run."""
        own = [f"{key}={_spell(value)}" for key, value in settings.items()]
        return [*self.overrides, *own, f"output={self.student().output / name_run(settings)}"]


def sweep(plan: Sweep, proposer: Proposer) -> Path:
    """Train the proposed runs, compare all that are finished, and return the report.

    Raises:
        ConfigError: a setting does not fit (before any run), or the metric is not measured.
        StillroomError: runs failed; the others are finished and compared.
    """
    output = plan.student().output
    for settings in proposer.samples():
        plan.student(settings)
    for result in sorted(output.glob("*/result.json")):
        _recall(plan, proposer, result.parent)
    failed: list[str] = []
    with ThreadPoolExecutor(plan.jobs) as pool:
        turns = [pool.submit(_take_turns, plan, proposer, failed) for _ in range(plan.jobs)]
    for turn in turns:
        turn.result()
    finished = [run for run in proposer.told() if (run / "result.json").is_file()]
    if finished:
        compare(order_runs(finished, plan.metric, plan.slice), output / "report.html", plan.console)
    if failed:
        raise StillroomError(
            f"sweep: {len(failed)} of {len(proposer.told())} runs failed: {'; '.join(failed)};"
            " run it again to go on"
        )
    return output / "report.html"


def order_runs(runs: Sequence[Path], metric: str, slice: str = "all") -> list[Path]:
    """Runs from the best to the worst by a metric; the order of their names where it has none.

    Raises:
        ConfigError: the metric was not measured.
    """
    found = {run: _measured(run, metric, slice) for run in runs}
    higher = any(m.direction == "higher" for m in found.values())
    return sorted(runs, key=lambda run: (found[run].value * (-1 if higher else 1), str(run)))


def name_run(settings: Mapping[str, Any]) -> str:
    """The folder of a run: each setting by the shortest end of its key that is its own."""
    paths = {key: key.split(".") for key in settings}
    parts = []
    for key, value in settings.items():
        length = 1
        while any(paths[o][-length:] == paths[key][-length:] for o in paths if o != key):
            length += 1
        parts.append(f"{'.'.join(paths[key][-length:])}={_spell(value)}")
    spelt = ",".join(parts)
    name = re.sub(r"[^\w.,=+-]+", "_", spelt)[:_LONGEST_NAME]
    return name if name == spelt else f"{name}-{digest_json(dict(settings))[:8]}"


def _take_turns(plan: Sweep, proposer: Proposer, failed: list[str]) -> None:
    """Train one proposed run after the other until there is none."""
    while (proposal := proposer.propose()) is not None:
        settings = proposal.settings
        config = plan.student(settings)
        name = config.output.name
        trouble = _train(plan, config, settings)
        if trouble is None:
            metric = _measured(config.output, plan.metric, plan.slice)
            proposer.tell(proposal, config.output, metric)
            plan.console.print(f"{name}: {plan.metric} {metric.value:.4g}", highlight=False)
        else:
            proposer.tell(proposal, config.output, None)
            failed.append(f"{name} ({trouble})")
            plan.console.print(f"{name}: failed ({trouble})", highlight=False, markup=False)


def _train(plan: Sweep, config: StudentConfig, settings: Mapping[str, Any]) -> str | None:
    """Train a run that is not finished; what it said last where it fails."""
    try:
        known = describe_cache(TeacherCache.open(config.cache))
        if is_finished(config.output, config, known):
            return None
        if plan.jobs == 1:  # importing the libraries takes longer than many a run
            train_student(config)
            return None
    except StillroomError as error:
        return str(error)
    except Exception as error:  # a bug in one run is told at the end, like all else
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "train.log").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error}"
    return _train_apart(plan, config, settings)


def _train_apart(plan: Sweep, config: StudentConfig, settings: Mapping[str, Any]) -> str | None:
    """Train in a process of its own, with its share of the processors."""
    threads = max(1, len(os.sched_getaffinity(0)) // plan.jobs)
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    options = [part for setting in plan.settings_of(settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "stages.cli", "train-student", str(plan.config), *options]
    log = config.output / "train.log"
    config.output.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        code = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code == 0:
        return None
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1].removeprefix("error: ") if said else f"exit code {code}"


def _recall(plan: Sweep, proposer: Proposer, run: Path) -> None:
    """Tell the proposer of a run that an earlier sweep of the same config finished."""
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    settings = proposer.read(raw)
    if settings is None or name_run(settings) != run.name:
        return
    here = plan.student(settings).model_dump(mode="json")
    there = StudentConfig.model_validate(raw).model_dump(mode="json")
    if here == there:
        proposer.recall(settings, run, _measured(run, plan.metric, plan.slice))


def _measured(run: Path, name: str, slice: str) -> Metric:
    metrics = read_result(run).metrics
    for metric in metrics:
        if (metric.name, metric.slice) == (name, slice):
            return metric
    wanted = Metric(name, 0.0, "", "none", slice).key
    raise ConfigError(
        f"sweep: {run} has no metric {wanted!r}{did_you_mean(wanted, {m.key for m in metrics})}"
    )


def _spell(value: Any) -> str:
    """A value as YAML reads it back, on one line."""
    spelt = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return spelt.removesuffix("\n...").strip()
