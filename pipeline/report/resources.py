"""How much there was to learn from: training rows of each language, and draws where it was sampled.

details["training_rows"] = {column: {value: {"rows": n, "draws": n}}} -> order of slices, a table
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.languages import slice_heading
from pipeline.report.markup import Html, element
from pipeline.report.model import Comparison, RunReport
from pipeline.report.rows import ABSENT
from pipeline.report.sections import run_headings, scrolling


def training_rows(comparison: Comparison, column: str) -> dict[str, int]:
    """Training rows of each value of a column, the most that any run had; {} if none tells."""
    most: dict[str, int] = {}
    for run in comparison.runs:
        for value, counts in _told(run, column).items():
            most[value] = max(most.get(value, 0), counts["rows"])
    return most


def order_values(values: Sequence[str], rows: Mapping[str, int]) -> list[str]:
    """Those with the most training rows first, then by name."""
    return sorted(values, key=lambda value: (-rows.get(value, 0), value))


def draws_table(comparison: Comparison, column: str) -> Html:
    """What an epoch of each sampled run drew of each value, beside the rows it has."""
    runs = [run for run in comparison.runs if _is_sampled(run, column)]
    if not runs:
        return Html("")
    rows = training_rows(comparison, column)
    labels = [run.label for run in runs]
    heads = [element("th", title, scope="col") for title in (column, "training rows")]
    head = element("tr", *heads, *run_headings(comparison, labels))
    body = []
    for value in order_values(list(rows), rows):
        drawn = [_told(run, column).get(value, {}).get("draws") for run in runs]
        cells = [element("td", ABSENT if n is None else f"{n:,}") for n in drawn]
        heading = slice_heading(column, value)
        body.append(element("tr", heading, element("td", f"{rows[value]:,}"), *cells))
    table = scrolling(element("thead", head), element("tbody", *body), class_="narrow")
    return element("details", element("summary", "Draws of an epoch"), table)


def _told(run: RunReport, column: str) -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = run.result.details.get("training_rows", {}).get(
        column, {}
    )
    return found


def _is_sampled(run: RunReport, column: str) -> bool:
    return any("draws" in counts for counts in _told(run, column).values())
