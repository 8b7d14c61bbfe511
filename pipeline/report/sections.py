"""The parts of the page that are tables: the comparison, slices, cost, configs, environment.

Each function takes the Comparison and returns its <section>, or nothing where it has no data.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.curves import slot_of
from pipeline.report.findings import Difference, config_differences, live_costs, primary_column
from pipeline.report.markup import Html, element, join, text_in_own_direction
from pipeline.report.model import CacheReport, Comparison
from pipeline.report.rows import (
    ABSENT,
    Row,
    best_rows,
    format_bytes,
    format_cells,
    format_count,
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
        tds = [_number_cell(cells[c.name][i], i in best[c.name]) for c in columns]
        body.append(element("tr", _row_heading(comparison, row), *tds, class_=row.role))
    caption = "↓ lower is better, ↑ higher is better. Underlined: the best student of the column."
    return element(
        "section",
        element("h2", "On held-out examples"),
        _dot_plot(comparison, rows),
        scrolling(element("thead", element("tr", *head)), element("tbody", *body)),
        element("p", caption, class_="caption"),
    )


def cost_section(comparison: Comparison) -> Html:
    """What each cache cost, beside what live teaching would have cost the same students."""
    if not comparison.caches:
        return Html("")
    parts = [_cache_cost(comparison, cache) for cache in comparison.caches]
    return element("section", element("h2", "What the teacher cost"), *parts)


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


def _row_heading(comparison: Comparison, row: Row) -> Html:
    if row.role == "teacher":
        role = element("span", "teacher", class_="role")
        return element("th", _text(row.label), role, scope="row")
    slot = slot_of(comparison, row.label)
    return element("th", draw_key(slot), _text(row.label), scope="row", class_=_slot_class(slot))


def _number_cell(text: str, is_best: bool) -> Html:
    if not is_best:
        return element("td", text, class_="absent" if text == ABSENT else None)
    return element("td", element("b", text, title="best student"), class_="best")


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


def _cache_cost(comparison: Comparison, cache: CacheReport) -> Html:
    facts = [
        ("Cache", cache.path),
        ("Tokens read", format_count(cache.tokens)),
        ("Distributions kept", format_count(cache.targets)),
        ("Capture, once", format_seconds(cache.capture_seconds)),
        ("Size", format_bytes(cache.bytes)),
        ("Bytes per token", f"{cache.bytes / max(cache.tokens, 1):,.1f}"),
    ]
    if cache.forward_seconds is not None:
        forward = f"{format_seconds(cache.forward_seconds)} of it"
        facts.insert(4, ("Teacher's forward passes", forward))
    pairs = [element("div", element("dt", k), element("dd", v)) for k, v in facts]
    parts = [element("dl", *pairs, class_="facts"), _live_cost(comparison, cache)]
    if cache.column_bytes:
        parts.append(_column_bytes(cache))
    return join(*parts)


def _live_cost(comparison: Comparison, cache: CacheReport) -> Html:
    costs = live_costs(comparison, cache)
    if not costs or cache.forward_seconds is None:
        return Html("")
    total = sum(cost.seconds for cost in costs)
    per_token = cache.forward_seconds / cache.tokens
    lead = (
        f"Computed from the measured capture: every token a distilled student saw, times the"
        f" teacher's {1e6 * per_token:,.1f} µs of forward pass per token. Students that learn from"
        " labels alone would need no teacher and are left out."
    )
    body = [
        element(
            "tr",
            *(_row_heading(comparison, Row(cost.label, "student", {})),),
            element("td", format_count(cost.tokens)),
            element("td", format_seconds(cost.seconds)),
        )
        for cost in costs
    ]
    for label, seconds in (
        ("All of them, live", total),
        ("The cache, once", cache.capture_seconds),
    ):
        cells = [element("th", label, scope="row"), element("td", "")]
        body.append(element("tr", *cells, element("td", format_seconds(seconds)), class_="total"))
    headings = ("", "Tokens seen", "Live teacher")
    head = element("tr", *(element("th", text, scope="col") for text in headings))
    heading = element("h3", "Had the teacher taught live")
    table = scrolling(element("thead", head), element("tbody", *body), class_="narrow")
    return join(heading, element("p", lead, class_="lead"), table)


def _column_bytes(cache: CacheReport) -> Html:
    largest = max(*cache.column_bytes.values(), 1)
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            element("td", f"{count / max(cache.tokens, 1):,.2f}"),
            element("td", format_bytes(count)),
            element("td", element("i", "", style=f"width:{100 * count / largest:.1f}%")),
        )
        for name, count in sorted(cache.column_bytes.items(), key=lambda item: -item[1])
    ]
    headings = ("Column", "Bytes per token", "Size", "")
    head = element("tr", *(element("th", text, scope="col") for text in headings))
    table = scrolling(element("thead", head), element("tbody", *body), class_="narrow bars")
    return join(element("h3", "Where the bytes are"), table)


def _side_by_side(comparison: Comparison, facts: Sequence[Difference]) -> Html:
    labels = [run.label for run in comparison.runs]
    head = element("tr", element("th", "", scope="col"), *run_headings(comparison, labels))
    body = []
    for fact in facts:
        if len(set(fact.values)) == 1 and len(fact.values) > 1:
            cells = [element("td", fact.values[0], colspan=len(fact.values), class_="shared")]
        else:
            cells = [
                element("td", v, class_="absent" if v == ABSENT else None) for v in fact.values
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
        return f"{value:,.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_fact(k, v)}" for k, v in value.items())
    return json.dumps(value, ensure_ascii=False)
