"""The whole report as one HTML file that asks nothing of any other file or address.

    Comparison -> sections -> page, with its style sheet and script inside

The page forbids itself every outside address and every script but its own, by digest.
"""

import base64
import hashlib
from importlib.resources import files

from pipeline import __version__
from pipeline.report.classes import classes_section
from pipeline.report.cost import cost_section
from pipeline.report.curves import curves_section
from pipeline.report.excerpts import excerpts_section
from pipeline.report.findings import headline, verdict
from pipeline.report.markup import Html, element, join
from pipeline.report.model import Comparison
from pipeline.report.sections import (
    comparison_section,
    differences_section,
    environment_section,
)
from pipeline.report.slices import slices_section


def render_page(comparison: Comparison) -> str:
    """The report; the same comparison gives the same bytes."""
    title = headline(comparison)
    style, script = _packaged("report.css"), _packaged("report.js")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    sections = [
        comparison_section(comparison),
        curves_section(comparison),
        slices_section(comparison),
        classes_section(comparison),
        excerpts_section(comparison),
        cost_section(comparison),
        differences_section(comparison),
        environment_section(comparison),
    ]
    body = element("body", _header(comparison, title), element("main", *sections), _footer())
    page = element("html", head, join(body, element("script", script)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _header(comparison: Comparison, title: str) -> Html:
    eyebrow = element("p", f"Stillroom · {comparison.task}", class_="eyebrow")
    notes = [element("li", note) for note in comparison.notes]
    return element(
        "header",
        eyebrow,
        element("h1", title, dir="auto"),
        element("p", verdict(comparison), class_="verdict", dir="auto"),
        element("ul", *notes, class_="notes") if notes else Html(""),
    )


def _footer() -> Html:
    return element("footer", element("p", f"Written by stillroom {__version__}."))


def _packaged(name: str) -> Html:
    return Html(files("pipeline.report").joinpath(name).read_text(encoding="utf-8"))


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
