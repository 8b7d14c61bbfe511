"""Metrics per slice (language, ...) as tables that are shaded as heat maps.

metrics with a slice -> one table per sliced column and metric: slices down, models across; those
with the most training rows first, where a run tells
"""

import math
from collections.abc import Mapping, Sequence
from itertools import compress

from pipeline.metrics import Metric
from pipeline.report.findings import primary_column
from pipeline.report.languages import slice_heading
from pipeline.report.markup import Html, element, join, text_in_own_direction
from pipeline.report.model import Comparison
from pipeline.report.resources import draws_table, order_values, training_rows
from pipeline.report.rows import (
    ABSENT,
    Column,
    Row,
    best_rows,
    columns_of,
    decimals_of,
    rows_of,
)
from pipeline.report.sections import heat_class, run_headings, scrolling


def slices_section(comparison: Comparison) -> Html:
    """Every sliced column: the metric of the verdict and macro-F1 open, the others folded."""
    metrics = [m for run in comparison.runs for m in run.result.metrics]
    metrics += [m for t in comparison.teachers for m in t.metrics]
    by_column: dict[str, list[str]] = {}
    for metric in metrics:
        column, separator, _ = metric.slice.partition("=")
        if separator and metric.slice not in by_column.setdefault(column, []):
            by_column[column].append(metric.slice)
    parts = [_sliced(comparison, name, slices, metrics) for name, slices in by_column.items()]
    return join(*parts)


def shades(
    rows: Sequence[Sequence[float | None]],
    lower_is_better: bool = False,
    ends: tuple[float, float] | None = None,
) -> list[list[float | None]]:
    """Shades in [0, 100] over a whole table, the better the stronger; None stays None.

    Args:
        ends: the lowest value and the highest that are told apart, those of the table by default.
    """
    present = [value for row in rows for value in row if value is not None]
    low, high = ends or (min(present, default=0.0), max(present, default=1.0))
    spread = (high - low) or 1.0

    def shade(value: float) -> float:
        share = (high - value if lower_is_better else value - low) / spread
        return 100 * min(max(share, 0.0), 1.0)

    return [[None if value is None else shade(value) for value in row] for row in rows]


def heat_cell(text: str, shade: float | None, *, best: bool = False) -> Html:
    """A number on its shade; the text says it all, the shade only helps the eye."""
    if shade is None:
        return element("td", ABSENT, class_="absent")
    inner = element("b", text, title="best student") if best else text
    return element("td", inner, class_="best" if best else None, style=f"--v:{shade:.0f}")


def _sliced(
    comparison: Comparison, name: str, slices: Sequence[str], metrics: Sequence[Metric]
) -> Html:
    known = set(slices)
    rows = training_rows(comparison, name)
    rows = rows if len(set(rows.values())) > 1 else {}  # what is the same of all orders nothing
    values = order_values([slice.partition("=")[2] for slice in slices], rows)
    slices = [f"{name}={value}" for value in values]
    measured = (m for m in metrics if m.slice in known and math.isfinite(m.value))
    columns = columns_of(measured, slice=None)
    primary = primary_column(comparison)
    first = [primary.name] if primary is not None else []
    columns.sort(key=lambda column: (column.name not in first, column.name != "macro_f1"))
    tables = []
    for column in columns:
        unit = element("span", f" {column.unit}", class_="unit") if column.unit else Html("")
        summary = element("summary", column.heading, unit)
        table = _slice_table(comparison, name, slices, column, rows)
        is_open = column.name in (*first, "macro_f1")
        tables.append(element("details", summary, table, open=is_open))
    lead = ["The stronger the shade, the better; underlined: the best student of the row."]
    if rows:
        lead.append("Those with the most training rows first.")
    return element(
        "section",
        element("h2", join("By ", text_in_own_direction(name))),
        element("p", " ".join(lead + _partly_measured(comparison, slices)), class_="lead"),
        *tables,
        draws_table(comparison, name),
    )


def _partly_measured(comparison: Comparison, slices: Sequence[str]) -> list[str]:
    """A sentence for each teacher that was asked about some of the slices only."""
    sentences = []
    for teacher in comparison.teachers:
        measured = {metric.slice for metric in teacher.metrics}
        own = [slice.partition("=")[2] for slice in slices if slice in measured]
        if 0 < len(own) < len(slices):
            read = ", ".join(own[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "")
            sentences.append(f"The cache asked {teacher.label} about {read} alone.")
    return sentences


def _slice_table(
    comparison: Comparison,
    name: str,
    slices: Sequence[str],
    column: Column,
    training: Mapping[str, int],
) -> Html:
    by_slice = _measured_rows(comparison, slices, column)
    labels = [row.label for row in by_slice[0]]
    values = [[row.values.get(column.name) for row in rows] for rows in by_slice]
    decimals = decimals_of(column.unit, [v for row in values for v in row if v is not None])
    ends = _ends(by_slice, column)
    colours = shades(values, column.direction == "lower", ends)
    body = []
    for slice, rows, shaded in zip(slices, by_slice, colours, strict=True):
        value = slice.removeprefix(f"{name}=")
        cells = _cells(rows, shaded, column, decimals)
        if training:
            cells.insert(0, element("td", f"{training.get(value, 0):,}", class_="rows"))
        body.append(element("tr", slice_heading(name, value), *cells))
    means = [row.values.get(column.name) for row in _means(by_slice, column)]
    cells = [element("td", _text_of(mean, decimals)) for mean in means]
    last = element("th", "Mean of slices", scope="row", colspan=2 if training else None)
    body.append(element("tr", last, *cells, class_="total"))
    heads = [
        element("th", title, scope="col") for title in (name, *["training rows"][: len(training)])
    ]
    head = element("tr", *heads, *run_headings(comparison, labels))
    table = scrolling(
        element("thead", head), element("tbody", *body), class_=heat_class(len(labels))
    )
    return join(table, _scale(*ends, column, decimals))


def _ends(by_slice: Sequence[Sequence[Row]], column: Column) -> tuple[float, float]:
    """The lowest value and the highest of the students: a teacher far above would pale them all."""
    rows = [row for rows in by_slice for row in rows if column.name in row.values]
    students = [row for row in rows if row.role == "student"] or rows
    values = [row.values[column.name] for row in students]
    return min(values), max(values)


def _scale(low: float, high: float, column: Column, decimals: int) -> Html:
    """What the shades mean: the worst value and the best, with all shades between them."""
    worst, best = (high, low) if column.direction == "lower" else (low, high)
    ends = [element("span", _text_of(value, decimals)) for value in (worst, best)]
    return element("p", ends[0], element("i", ""), ends[1], class_="scale")


def _measured_rows(
    comparison: Comparison, slices: Sequence[str], column: Column
) -> list[list[Row]]:
    """Rows per slice of the models that were measured on any; an empty column says nothing."""
    by_slice = [rows_of(comparison, slice) for slice in slices]
    measured = [
        any(column.name in row.values for row in rows) for rows in zip(*by_slice, strict=True)
    ]
    return [list(compress(rows, measured)) for rows in by_slice]


def _cells(
    rows: Sequence[Row], shaded: Sequence[float | None], column: Column, decimals: int
) -> list[Html]:
    best = best_rows(rows, column)
    return [
        heat_cell(_text_of(row.values.get(column.name), decimals), shade, best=i in best)
        for i, (row, shade) in enumerate(zip(rows, shaded, strict=True))
    ]


def _means(by_slice: Sequence[Sequence[Row]], column: Column) -> list[Row]:
    """Each model's plain mean over its slices, none where a slice is missing."""
    means = []
    for rows in zip(*by_slice, strict=True):
        values = [row.values[column.name] for row in rows if column.name in row.values]
        whole = {column.name: sum(values) / len(values)} if len(values) == len(rows) else {}
        means.append(Row(rows[0].label, rows[0].role, whole))
    return means


def _text_of(value: float | None, decimals: int) -> str:
    return ABSENT if value is None else f"{value:,.{decimals}f}"
