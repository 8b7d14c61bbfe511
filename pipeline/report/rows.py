"""The rows and columns that the terminal's table and the page share.

    Comparison -> columns_of, rows_of -> Column, Row -> cells as text, best student per column

Within a column every number has the same decimals, so that digits line up.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics import Direction, Metric
from pipeline.report.model import Comparison, label_teacher

TITLES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "agreement": "Agreement",
    "kl_to_teacher": "KL to teacher",
    "ece": "ECE",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "entity_f1": "Entity F1",
    "exact_match": "Exact match",
    "f1": "F1",
}
ARROWS: dict[Direction, str] = {"lower": "↓", "higher": "↑", "none": ""}
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A column of numbers: its metric's name, title, unit and direction."""

    name: str
    title: str
    unit: str
    direction: Direction

    @property
    def heading(self) -> str:
        """The title with the arrow that points to better, which never stands on a line alone."""
        arrow = ARROWS[self.direction]
        return f"{self.title}\N{NO-BREAK SPACE}{arrow}" if arrow else self.title


@dataclass(frozen=True)
class Row:
    """One model: `role` is "teacher" or "student", values by column name."""

    label: str
    role: str
    values: dict[str, float]


def title_of(name: str) -> str:
    """The name of a metric as people write it."""
    return TITLES.get(name, name.replace("_", " ").capitalize())


def columns_of(metrics: Iterable[Metric], slice: str | None = "all") -> list[Column]:
    """One column per metric name, the well-known ones first and in their usual order.

    Args:
        metrics: of every row, in any order.
        slice: only metrics measured on it; None for all of them.
    """
    found: dict[str, Column] = {}
    for metric in metrics:
        if slice is None or metric.slice == slice:
            column = Column(metric.name, title_of(metric.name), metric.unit, metric.direction)
            found.setdefault(metric.name, column)
    known = [found.pop(name) for name in TITLES if name in found]
    return known + list(found.values())


def rows_of(comparison: Comparison, slice: str = "all") -> list[Row]:
    """Teachers first, then the students in their order, with what was measured on a slice."""
    rows = [
        Row(t.label, "teacher", _values(t.metrics, slice, t.parameters, {}))
        for t in comparison.teachers
    ]
    for run in sorted(comparison.runs, key=lambda run: run.is_student):
        values = _values(run.result.metrics, slice, run.parameters, run.result.training)
        if run.is_student:
            rows.append(Row(run.label, "student", values))
        else:  # measured by its own training, maybe on other examples
            rows.append(Row(f"{label_teacher(run.label)} (own run)", "teacher", values))
    return rows


def table_columns(comparison: Comparison) -> list[Column]:
    """Every column of the comparison table: parameters, the metrics, what training took."""
    metrics = [m for t in comparison.teachers for m in t.metrics]
    metrics += [m for run in comparison.runs for m in run.result.metrics]
    parameters = Column("parameters", "Parameters", "", "none")
    training = [
        Column("tokens_seen", "Tokens seen", "", "none"),
        Column("seconds", "Training", "", "none"),
    ]
    rows = rows_of(comparison)
    columns = [parameters, *columns_of(metrics), *training]
    return [c for c in columns if any(c.name in row.values for row in rows)]


def best_rows(rows: Sequence[Row], column: Column) -> set[int]:
    """Indices of the students that are best in a column, as far as its decimals tell.

    None where all are equal or there is one only.
    """
    if column.direction == "none":
        return set()
    values = {
        i: row.values[column.name]
        for i, row in enumerate(rows)
        if row.role == "student" and column.name in row.values
    }
    decimals = decimals_of(column.unit, [v for row in rows if (v := row.values.get(column.name))])
    values = {i: round(value, decimals) for i, value in values.items()}
    if len(set(values.values())) < 2:
        return set()
    best = min(values.values()) if column.direction == "lower" else max(values.values())
    return {i for i, value in values.items() if value == best}


def format_cells(rows: Sequence[Row], column: Column) -> list[str]:
    """The text of a column's cells, with the same decimals and, where they allow, multiple."""
    values = [row.values.get(column.name) for row in rows]
    present = [value for value in values if value is not None]
    if column.name == "seconds":
        largest = max(present, default=0.0)
        return [ABSENT if v is None else format_seconds(v, largest) for v in values]
    if column.name in ("parameters", "tokens_seen"):
        divisor, suffix = count_multiple(max(present, default=0))
        decimals = decimals_of_count(suffix)
        if min(present, default=divisor) < divisor / 20:  # a small one would read as 0.00
            return [ABSENT if v is None else format_count(v) for v in values]
        return [ABSENT if v is None else f"{v / divisor:,.{decimals}f}{suffix}" for v in values]
    decimals = decimals_of(column.unit, present)
    return [ABSENT if v is None else f"{v:,.{decimals}f}" for v in values]


def decimals_of(unit: str, values: Iterable[float]) -> int:
    """How many decimals tell values of a unit apart without pretending precision."""
    if unit == "%":
        return 1
    if unit.startswith("nats"):
        return 3
    largest = max((abs(value) for value in values), default=0.0)
    return next((d for d, bound in ((3, 10), (2, 100), (1, 1000)) if largest < bound), 0)


def count_multiple(largest: float) -> tuple[float, str]:
    """The multiple in which counts up to `largest` read well: divisor and suffix."""
    for divisor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if largest >= divisor:
            return (1e3 if suffix == " k" else divisor), suffix
    return 1.0, ""


def format_count(value: float) -> str:
    """A count on its own: 4.20 M, 612."""
    divisor, suffix = count_multiple(value)
    return f"{value / divisor:,.{decimals_of_count(suffix)}f}{suffix}"


def decimals_of_count(suffix: str) -> int:
    """Two for millions and more, one for thousands, none for a plain number."""
    return {"": 0, " k": 1}.get(suffix, 2)


def format_seconds(seconds: float, largest: float | None = None) -> str:
    """A duration: 8.4 s, 3 min 07 s, 2 h 05 min; seconds as minutes beside a `largest` of some."""
    if seconds < 60 and not (largest is not None and 60 <= largest < 3600):
        return f"{seconds:.1f} s" if seconds >= 0.1 or seconds == 0 else f"{1e3 * seconds:.1f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def format_bytes(count: float) -> str:
    """A size: 512 B, 29.4 MB (powers of 1,000)."""
    for divisor, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= divisor:
            return f"{count / divisor:,.1f} {suffix}"
    return f"{count:,.0f} B"


def _values(
    metrics: Iterable[Metric],
    slice: str,
    parameters: int | None,
    training: Mapping[str, Any],
) -> dict[str, float]:
    values = {m.name: m.value for m in metrics if m.slice == slice and math.isfinite(m.value)}
    if slice != "all":
        return values
    if parameters is not None:
        values["parameters"] = float(parameters)
    for name in ("tokens_seen", "seconds"):
        if training.get(name) is not None:
            values[name] = float(training[name])
    return values
