"""The parts of the page that are tables: the comparison, the configs, the environment.

Each function takes the Comparison and returns its <section>, or nothing where it has no data.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.curves import slot_of
from pipeline.report.findings import (
    Difference,
    config_differences,
    primary_column,
)
from pipeline.report.markup import Html, element, join, text_in_own_direction
from pipeline.report.model import Comparison
from pipeline.report.rows import (
    ABSENT,
    Row,
    best_rows,
    format_cells,
    format_seconds,
    rows_of,
    table_columns,
)
from pipeline.report.svg import SLOTS, draw_key


def comparison_section(comparison: Comparison) -> Html:
    """The dot plot of the metric that matters and the table of all of them."""
    rows = rows_of(comparison)
    columns = table_columns(comparison)
    head = [element("th", "", scope="col")]
    for column in columns:
        unit = element("span", column.unit, class_="unit") if column.unit else Html("")
        head.append(element("th", column.heading, unit, scope="col"))
    cells = {c.name: format_cells(rows, c) for c in columns}
    best = {c.name: best_rows(rows, c) for c in columns}
    body = []
    for i, row in enumerate(rows):
        tds = [
            _number_cell(cells[c.name][i], i in best[c.name], f"{c.heading} {c.unit}".rstrip())
            for c in columns
        ]
        body.append(element("tr", row_heading(comparison, row), *tds, class_=row.role))
    caption = "↓ lower is better, ↑ higher is better. Underlined: the best student of the column."
    return element(
        "section",
        element("h2", "On held-out examples"),
        _dot_plot(comparison, rows),
        scrolling(element("thead", element("tr", *head)), element("tbody", *body), class_="models"),
        element("p", caption, class_="caption"),
    )


def differences_section(comparison: Comparison) -> Html:
    """The config keys that differ, side by side."""
    if len(comparison.runs) < 2:
        return Html("")
    differences = config_differences(comparison.runs)
    heading = element("h2", "Where the configs differ")
    if not differences:
        return element("section", heading, element("p", "They are the same.", class_="lead"))
    return element("section", heading, _side_by_side(comparison, differences))


def environment_section(comparison: Comparison) -> Html:
    """What each run was and where it ran; what all runs share is told once."""
    facts: dict[str, list[str]] = {}
    for i, run in enumerate(comparison.runs):
        environment = run.result.details.get("environment", {})
        for source in (run.result.model, run.result.training, environment):
            for key, value in source.items():
                texts = facts.setdefault(key, [ABSENT] * len(comparison.runs))
                texts[i] = _fact(key, value)
    table = [Difference(key.replace("_", " "), tuple(texts)) for key, texts in facts.items()]
    if not table:
        return Html("")
    return element(
        "section", element("h2", "Models and environment"), _side_by_side(comparison, table)
    )


def scrolling(*parts: Html, class_: str = "") -> Html:
    """A table that scrolls inside its own box on a narrow screen."""
    return element("div", element("table", *parts, class_=class_ or None), class_="scroll")


def heat_class(models: int) -> str:
    """The class of a heat map; the headings of many models stand upright."""
    return "heat many" if models > 7 else "heat"


def run_headings(comparison: Comparison, labels: Sequence[str]) -> list[Html]:
    """Column headings with the runs' own marks; a label that is no run has none."""
    known = {run.label for run in comparison.runs}
    headings = []
    for label in labels:
        slot = slot_of(comparison, label) if label in known else None
        key = Html("") if slot is None else draw_key(slot)
        headings.append(element("th", key, _text(label), scope="col", class_=_slot_class(slot)))
    return headings


def _slot_class(slot: int | None) -> str | None:
    return None if slot is None else f"s{slot % SLOTS}"


def _text(label: str) -> Html:
    return join(text_in_own_direction(label))


def row_heading(comparison: Comparison, row: Row) -> Html:
    if row.role == "teacher":
        return element("th", _text(row.label), scope="row")
    slot = slot_of(comparison, row.label)
    return element("th", draw_key(slot), _text(row.label), scope="row", class_=_slot_class(slot))


def _number_cell(text: str, is_best: bool, head: str) -> Html:
    if not is_best:
        return element("td", text, class_="absent" if text == ABSENT else None, data_head=head)
    return element("td", element("b", text, title="best student"), class_="best", data_head=head)


def _dot_plot(comparison: Comparison, rows: Sequence[Row]) -> Html:
    """One line per model, its value as a dot between the worst and the best of all."""
    column = primary_column(comparison)
    shown = [row for row in rows if column and column.name in row.values]
    if column is None or len(shown) < 2:
        return Html("")
    values = [row.values[column.name] for row in shown]
    low, spread = min(values), (max(values) - min(values)) or 1.0
    lines = []
    for row, text in zip(shown, format_cells(shown, column), strict=True):
        share = 100 * (row.values[column.name] - low) / spread
        slot = None if row.role == "teacher" else slot_of(comparison, row.label)
        dot = element("i", "", style=f"left:{share:.2f}%")
        lines.append(
            element(
                "div",
                element("span", _text(row.label), class_="name"),
                element("span", dot, class_="track"),
                element("span", text, class_="value"),
                class_=f"dot {_slot_class(slot) or 'is-teacher'}",
            )
        )
    unit = element("span", f" {column.unit}", class_="unit") if column.unit else Html("")
    return element("figure", element("figcaption", column.heading, unit), *lines, class_="dots")


def _side_by_side(comparison: Comparison, facts: Sequence[Difference]) -> Html:
    labels = [run.label for run in comparison.runs]
    head = element("tr", element("th", "", scope="col"), *run_headings(comparison, labels))
    body = []
    for fact in facts:
        if len(set(fact.values)) == 1 and len(fact.values) > 1:
            cells = [element("td", fact.values[0], colspan=len(fact.values), class_="shared")]
        else:
            cells = [
                element("td", v, class_="absent" if v == ABSENT else None, data_head=label)
                for v, label in zip(fact.values, labels, strict=True)
            ]
        body.append(element("tr", element("th", fact.key, scope="row"), *cells))
    return scrolling(element("thead", head), element("tbody", *body), class_="texts")


def _fact(key: str, value: Any) -> str:
    if value is None:
        return ABSENT
    if key.endswith("seconds"):
        return format_seconds(float(value))
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_fact(k, v)}" for k, v in value.items())
    return json.dumps(value, ensure_ascii=False)
