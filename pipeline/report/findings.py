"""What the numbers say: the verdict, and the differences between configs.

Comparison -> headline, verdict | config_differences
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.model import Comparison, RunReport
from pipeline.report.rows import (
    Column,
    columns_of,
    decimals_of,
    format_count,
)
from pipeline.report.text import isolate

UNSET = "–"


@dataclass(frozen=True)
class Difference:
    """A config key whose value is not the same in every run; one text per run, in their order."""

    key: str
    values: tuple[str, ...]


def primary_column(comparison: Comparison) -> Column | None:
    """The metric that the verdict is about: F1 where entities or answers are found, accuracy where
    classes are counted, else the loss."""
    columns = {c.name: c for r in comparison.runs for c in columns_of(r.result.metrics)}
    order = ["loss", *columns]
    if "macro_f1" in columns:
        order = ["entity_f1", "accuracy", "macro_f1", *order]
    if "exact_match" in columns:
        order = ["f1", *order]
    return next((columns[name] for name in order if name in columns), None)


def headline(comparison: Comparison) -> str:
    """What was distilled from what, as a title."""
    teachers = " and ".join(teacher.label for teacher in comparison.teachers)
    distilled = sum(run.is_distilled for run in comparison.runs)
    if not distilled or not teachers:
        count = len(comparison.runs)
        return f"{spell_number(count)} run{_s(count)} compared".capitalize()
    into = f"{spell_number(distilled)} student{_s(distilled)}"
    return f"{teachers[0].upper()}{teachers[1:]}, distilled into {into}"


def verdict(comparison: Comparison) -> str:
    """One sentence computed from the numbers."""
    column = primary_column(comparison)
    measured = [
        run for run in comparison.students if column and run.result.metric(column.name) is not None
    ]
    if column is None or not measured:
        return "No student was measured on held-out examples."
    distilled = [run for run in measured if run.is_distilled]
    plain = [run for run in measured if not run.is_distilled]
    if not distilled or not plain:
        return _best_alone(comparison, column, measured)
    return _distilled_against_plain(comparison, column, distilled, plain)


def closed_gap(plain: float, distilled: float, teacher: float, column: Column) -> float | None:
    """Share of the distance from undistilled student to teacher that distillation closed.

    None where the undistilled student is already as good as the teacher.
    """
    sign = 1.0 if column.direction == "lower" else -1.0
    distance = sign * (plain - teacher)
    return sign * (plain - distilled) / distance if distance > 0 else None


def config_differences(runs: Sequence[RunReport]) -> list[Difference]:
    """Keys whose values differ between the runs' resolved configs, in config order.

    A list of named members (losses) is keyed by their names, so that order does not matter. The
    run's own name and folder always differ and are left out.
    """
    flat = [_flatten(run.result.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    differences = []
    for key in keys:
        values = tuple(config.get(key, UNSET) for config in flat)
        if key not in ("name", "output") and len(set(values)) > 1:
            differences.append(Difference(key, values))
    return differences


def _distilled_against_plain(
    comparison: Comparison,
    column: Column,
    distilled: Sequence[RunReport],
    plain: Sequence[RunReport],
) -> str:
    sizes = {run.parameters for run in plain}
    fair = [run for run in distilled if run.parameters in sizes] or distilled
    best = _best(fair, column)
    rival = _best([r for r in plain if r.parameters == best.parameters] or plain, column)
    ours, theirs = _value(best, column), _value(rival, column)
    show = _Shower(column, (ours, theirs))
    won = (ours < theirs) == (column.direction == "lower") and ours != theirs
    of_size = " of the same size" if best.parameters == rival.parameters else " of another size"
    against = (
        f"{_quoted(best)} reaches {_named(column)} of {show(ours)} on held-out examples against"
        f" {show(theirs)} for {_quoted(rival)}, a student{of_size} that learned from labels alone"
    )
    if not won:
        return f"Distillation did not help here: {against}."
    return f"Distilled from the cache, {against}{_gap(comparison, column, ours, theirs, show)}."


def _gap(
    comparison: Comparison, column: Column, ours: float, theirs: float, show: "_Shower"
) -> str:
    teacher = _teacher_value(comparison, column)
    if teacher is None:
        return ""
    share = closed_gap(theirs, ours, teacher, column)
    if share is None:
        return f"; the teacher has {show(teacher)}"
    if share >= 1.0:
        return f", and passes the teacher's {show(teacher)}"
    return f": {100 * share:.0f} % of the distance to the teacher's {show(teacher)} is closed"


def _best_alone(comparison: Comparison, column: Column, runs: Sequence[RunReport]) -> str:
    best = _best(runs, column)
    show = _Shower(column, (_value(best, column),))
    size = f" ({format_count(best.parameters)} parameters)" if best.parameters else ""
    teacher = _teacher_value(comparison, column)
    against = f"; the teacher has {show(teacher)}" if teacher is not None else ""
    of_these = f"The best of {spell_number(len(runs))} students, " if len(runs) > 1 else ""
    return (
        f"{of_these}{_quoted(best)}{size}{',' if of_these else ''} reaches {_named(column)} of"
        f" {show(_value(best, column))} on held-out examples{against}."
    )


class _Shower:
    """Formats values of one column with its unit and the same decimals."""

    def __init__(self, column: Column, values: Sequence[float]) -> None:
        self._unit = f" {column.unit}" if column.unit else ""
        self._decimals = decimals_of(column.unit, values)

    def __call__(self, value: float) -> str:
        return f"{value:.{self._decimals}f}{self._unit}"


def _value(run: RunReport, column: Column) -> float:
    value = run.result.metric(column.name)
    return float("nan") if value is None else value


def _best(runs: Sequence[RunReport], column: Column) -> RunReport:
    sign = 1.0 if column.direction == "lower" else -1.0
    return min(runs, key=lambda run: sign * _value(run, column))


def _teacher_value(comparison: Comparison, column: Column) -> float | None:
    """The teacher's value where there is one teacher; with several no single gap exists."""
    if len(comparison.teachers) != 1:
        return None
    metrics = comparison.teachers[0].metrics
    return next((m.value for m in metrics if (m.name, m.slice) == (column.name, "all")), None)


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, list) and value and all(_is_member(item) for item in value):
        names = [item["name"] for item in value]
        if len(set(names)) == len(names):
            value = {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in value}
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    if isinstance(value, Mapping | list) and not value:
        return {}  # nothing chosen is the same as nothing said
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return {prefix: ", ".join(str(item) for item in value)}
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _is_member(item: Any) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get("name"), str)


def _quoted(run: RunReport) -> str:
    """A name set apart from the sentence, and isolated from it where it runs right to left."""
    return f"“{isolate(run.label)}”"


def _named(column: Column) -> str:
    name = column.title if column.title.isupper() else column.title[:1].lower() + column.title[1:]
    spoken = "aeiouAEIOU" + ("FHLMNRSX" if name.isupper() else "")
    return f"{'an' if name[0] in spoken else 'a'} {name}"


def spell_number(count: int) -> str:
    """A small count as a word."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[count] if count < len(words) else str(count)


def _s(count: int) -> str:
    return "" if count == 1 else "s"
