"""The figures over training: one small chart per metric, over steps and over time.

runs' curves -> eval points per metric -> charts, one legend, teacher as a dashed line
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.markup import Html, element, join
from pipeline.report.model import Comparison
from pipeline.report.rows import Column, columns_of, decimals_of
from pipeline.report.svg import SLOTS, Reference, Series, draw_chart, draw_dashes, draw_key

TIME_UNITS = ((7200.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
ABOUT_TEACHER = ("agreement", "kl_to_teacher")  # the teacher's own value says nothing
AXES = (("step", "steps"), ("seconds", "time"))


def curve_points(
    curve: Iterable[Mapping[str, Any]], name: str, over: str, divisor: float = 1.0
) -> list[tuple[float, float]]:
    """(x, y) of every held-out measurement of a metric, x in units of `divisor`."""
    return [
        (line[over] / divisor, line[name])
        for line in curve
        if line.get("split") == "eval" and line.get(name) is not None and over in line
    ]


def curves_section(comparison: Comparison) -> Html:
    """The section of the page with every curve; empty where nothing was logged."""
    columns = _curve_columns(comparison)
    if not columns:
        return Html("")
    switch, figures = [], []
    for over, label in AXES:
        charts = [_figure(comparison, column, over) for column in columns]
        identity = f"over-{over}"
        switch += [
            element("input", type="radio", name="over", id=identity, checked=over == "step"),
            element("label", label, for_=identity),
        ]
        figures.append(element("div", *charts, class_=f"charts {identity}"))
    heading = element("h2", "Over training")
    chooser = element("div", element("span", "Plotted over"), *switch, class_="switch")
    head = element("div", heading, chooser, class_="head")
    lead = element("p", "Measured on the held-out examples while each run trained.", class_="lead")
    return element("section", head, lead, _legend(comparison), *figures, class_="curves")


def slot_of(comparison: Comparison, label: str) -> int:
    """The run's colour and marker, the same everywhere on the page."""
    return [run.label for run in comparison.runs].index(label)


def _curve_columns(comparison: Comparison) -> list[Column]:
    columns = columns_of(m for run in comparison.runs for m in run.result.metrics)
    logged = {name for run in comparison.runs for line in run.curve for name in line}
    found = [
        c
        for c in columns
        if c.name in logged and any(curve_points(r.curve, c.name, "step") for r in comparison.runs)
    ]
    # exp(loss) draws the loss's curve a second time
    names = {column.name for column in found}
    return [c for c in found if not (c.name == "perplexity" and "loss" in names)]


def _figure(comparison: Comparison, column: Column, over: str) -> Html:
    divisor, x_title = 1.0, "steps"
    if over == "seconds":
        divisor, x_title = _time_unit(comparison)
    series = [
        Series(run.label, slot, curve_points(run.curve, column.name, over, divisor))
        for slot, run in enumerate(comparison.runs)
    ]
    values = [y for s in series for _, y in s.points]
    unit = element("span", f" {column.unit}", class_="unit") if column.unit else Html("")
    title = f"{column.title} over {x_title}"
    chart = draw_chart(
        title, series, _references(comparison, column), x_title, decimals_of(column.unit, values)
    )
    return element("figure", element("figcaption", column.heading, unit), chart)


def _references(comparison: Comparison, column: Column) -> Sequence[Reference]:
    if column.name in ABOUT_TEACHER:
        return []
    return [
        Reference(teacher.label, metric.value, number)
        for number, teacher in enumerate(comparison.teachers)
        for metric in teacher.metrics
        if (metric.name, metric.slice) == (column.name, "all")
    ]


def _time_unit(comparison: Comparison) -> tuple[float, str]:
    longest = max(
        (line.get("seconds") or 0.0 for run in comparison.runs for line in run.curve), default=0.0
    )
    return next((divisor, name) for bound, divisor, name in TIME_UNITS if longest >= bound)


def _legend(comparison: Comparison) -> Html:
    items = [
        element("li", draw_key(slot), join(" ", run.label), class_=f"s{slot % SLOTS}")
        for slot, run in enumerate(comparison.runs)
        if run.curve
    ]
    items += [
        element("li", draw_dashes(number), join(" ", teacher.label), class_="is-teacher")
        for number, teacher in enumerate(comparison.teachers)
    ]
    return element("ul", *items, class_="legend")
