"""Compare finished runs of one task: a printed table and report.html.

run folders -> results and curves, their teachers, their caches -> Comparison -> table, page
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cache import Manifest, TeacherCache, list_sources
from pipeline.cache.documents import read_json
from pipeline.cache.sizes import column_bytes
from pipeline.errors import CacheError, StillroomError
from pipeline.metrics import Metric
from pipeline.report import (
    CacheReport,
    Comparison,
    RunReport,
    TeacherReport,
    print_table,
    render_page,
)
from pipeline.runs import read_curve, read_result
from pipeline.storage import as_path, write_bytes
from stages.disk import tells_of_disk

_TIMED = ("seconds", "forward_seconds")


@dataclass(frozen=True)
class Found:
    """Finished run folders, and those below a given folder that are not finished."""

    finished: list[Path]
    unfinished: list[Path]


@tells_of_disk(lambda runs, output, console=None: (output, "the runs are untouched"))
def compare(runs: Sequence[Path], output: Path, console: Console | None = None) -> Path:
    """Print the comparison of runs and write it to `output`, which is returned.

    Args:
        runs: run folders, or folders that hold runs, in the order of the table.
        output: the page, one self-contained HTML file.
        console: where the table is printed, standard output by default.

    Raises:
        StillroomError: no such run, an unfinished one, none at all, or runs of different tasks.
    """
    comparison = read_comparison(runs)
    print_table(comparison, console or Console())
    write_bytes(output, render_page(comparison).encode())
    return output


def read_comparison(runs: Sequence[Path]) -> Comparison:
    """Read runs, their teachers and what is left of their caches; see `compare`."""
    found = find_runs(runs)
    reports = [RunReport("", read_result(run), read_curve(run)) for run in found.finished]
    _require_one_task(found.finished, reports)
    labels = _unique_labels(found.finished, reports)
    reports = [replace(r, label=label) for r, label in zip(reports, labels, strict=True)]
    caches, notes = _read_caches(reports)
    notes += [f"{run}: not finished, left out." for run in found.unfinished]
    return Comparison(reports, _read_teachers(reports), caches, notes)


def find_runs(paths: Sequence[Path]) -> Found:
    """The runs that folders are or hold, in the order of the table.

    Raises:
        StillroomError: a folder holds none.
    """
    finished: dict[Path, None] = {}
    unfinished: list[Path] = []
    for path in paths:
        if (path / "result.json").is_file() or not path.is_dir():
            finished[path] = None  # read_result tells what is wrong with one that is missing
            continue
        below = sorted((file.parent for file in path.rglob("result.json")), key=_table_order)
        if not below and (path / "config.yaml").is_file():
            finished[path] = None
            continue
        if not below:
            raise StillroomError(
                f"{path}: holds no finished run; give a folder of `stillroom train-student`"
            )
        finished |= dict.fromkeys(below)
        begun = {file.parent for file in path.rglob("config.yaml")}
        unfinished += sorted(begun - set(below))
    if not finished:
        raise StillroomError("compare: no run was given; name at least one run folder")
    return Found(list(finished), unfinished)


def _table_order(run: Path) -> tuple[bool, int, str]:
    """Undistilled students first, then by size and name."""
    report = RunReport("", read_result(run))
    return report.is_distilled, report.parameters or 0, str(run)


def _require_one_task(paths: Sequence[Path], runs: Sequence[RunReport]) -> None:
    for path, run in zip(paths, runs, strict=True):
        first, task = runs[0].result.task, run.result.task
        if task != first:
            raise StillroomError(
                f"{path}: is a run of task {task}, but {paths[0]} is one of {first};"
                " compare runs of one task at a time"
            )


def _unique_labels(paths: Sequence[Path], runs: Sequence[RunReport]) -> list[str]:
    """The runs' names; with their folder where two have one name, else their whole path."""
    labels = [run.result.name for run in runs]
    for longer in (lambda path: f"{path.parent.name}/{path.name}", str):
        counts = Counter(labels)
        labels = [
            label if counts[label] == 1 else longer(path)
            for path, label in zip(paths, labels, strict=True)
        ]
    return labels


def _read_teachers(runs: Sequence[RunReport]) -> list[TeacherReport]:
    """The distinct teachers; one whose numbers differ between runs is told apart by the run."""
    teachers: list[TeacherReport] = []  # under the names that they had in their runs
    shown: list[str] = []
    for run in runs:
        if not run.result.details.get("teacher"):
            continue
        teacher = _parse_teacher(run.result.details["teacher"])
        alike = [i for i, known in enumerate(teachers) if _measured_alike(known, teacher)]
        if alike:
            known = teachers[alike[0]]
            more = [metric for metric in teacher.metrics if metric not in known.metrics]
            teachers[alike[0]] = replace(known, metrics=[*known.metrics, *more])
            continue
        new = all(known.name != teacher.name for known in teachers)
        shown.append(teacher.name if new else f"{teacher.name} (for {run.label})")
        teachers.append(teacher)
    return [replace(t, name=name) for t, name in zip(teachers, shown, strict=True)]


def _parse_teacher(raw: Mapping[str, Any]) -> TeacherReport:
    metrics = [Metric(**metric) for metric in raw["metrics"]]
    details = {k: v for k, v in raw.items() if k not in ("name", "parameters", "metrics")}
    return TeacherReport(raw["name"], raw.get("parameters"), metrics, details)


def _measured_alike(one: TeacherReport, other: TeacherReport) -> bool:
    """Whether both say the same of the whole; each run chooses its own slices."""
    wholes = [
        (t.name, t.parameters, t.details, [m for m in t.metrics if m.slice == "all"])
        for t in (one, other)
    ]
    return wholes[0] == wholes[1]


def _read_caches(runs: Sequence[RunReport]) -> tuple[list[CacheReport], list[str]]:
    """What the runs' caches cost; a note for each that cannot be told."""
    users: dict[tuple[Path, str], list[str]] = {}
    for run in runs:
        path, digest = run.result.config.get("cache"), run.result.identity.get("cache")
        if path and digest:
            users.setdefault((as_path(path), digest), []).append(run.label)
    caches, notes = [], []
    if len({digest for _, digest in users}) > 1:
        parts = [f"{path} ({', '.join(labels)})" for (path, _), labels in users.items()]
        notes.append(
            "These runs were trained from different caches, and their held-out examples may differ:"
            f" {'; '.join(parts)}."
        )
    for (path, digest), labels in users.items():
        found = _read_cache(path, digest)
        if isinstance(found, CacheReport):
            caches.append(found)
        else:
            notes.append(f"The cost of the cache of {', '.join(labels)} is left out: {found}.")
    return caches, notes


def _read_times(capture: Path) -> dict[str, float] | None:
    """The sums of a capture.json, which anybody may have written; None where they are none."""
    try:
        raw = read_json(capture)
    except CacheError:
        return None
    found = {name: raw.get(name) for name in (*_TIMED, "tokens")}
    numbers = {name: x for name, x in found.items() if isinstance(x, int | float)}
    sums = {name: float(x) for name, x in numbers.items() if math.isfinite(x) and x >= 0}
    return sums if len(sums) == len(found) else None


def _read_cache(path: Path, digest: str) -> CacheReport | str:
    """The report of a cache, or why there is none."""
    try:
        cache = TeacherCache.open(path)
    except CacheError as error:
        return str(error) if path.exists() else f"{path} is no longer there"
    if cache.manifest.digest != digest:
        return f"{path} holds another cache now"
    timing = dict.fromkeys(_TIMED, 0.0)
    for source in list_sources(cache):
        capture = source.cache.path / "capture.json"
        if not capture.is_file():
            return f"{capture} is missing, so nobody knows how long it took"
        took = _read_times(capture)
        if took is None:
            return f"{capture} makes no sense, so nobody knows how long it took"
        # A session that was killed while it wrote its last line is in the cache but not timed.
        untimed = source.cache.manifest.totals.tokens / max(took["tokens"], 1)
        timing = {name: timing[name] + took[name] * untimed * source.share for name in _TIMED}
    return _make_cache_report(cache, cache.manifest, timing)


def _make_cache_report(
    cache: TeacherCache, manifest: Manifest, timing: Mapping[str, float]
) -> CacheReport:
    totals = manifest.totals
    return CacheReport(
        path=str(cache.path),
        digest=manifest.digest,
        examples=totals.examples,
        tokens=totals.tokens,
        targets=totals.targets,
        capture_seconds=timing["seconds"],
        forward_seconds=timing["forward_seconds"],
        bytes=totals.bytes,
        column_bytes=column_bytes(cache),
    )
