"""Held-out texts in their own script and direction, with what each model made of them.

details["excerpts"] -> texts down, models across
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.languages import find_tag, slice_heading
from pipeline.report.markup import Html, element, text_in_own_direction
from pipeline.report.model import Comparison
from pipeline.report.rows import ABSENT
from pipeline.report.sections import run_headings, scrolling

_OPEN = 12  # so many texts are shown at once, more when asked for

Excerpt = Mapping[str, Any]  # language, text, label, prediction, confidence


def excerpts_section(comparison: Comparison) -> Html:
    """The texts that any run's task picked, teachers first among the models."""
    found = [(t.label, t.details.get("excerpts")) for t in comparison.teachers]
    found += [(run.label, run.result.details.get("excerpts")) for run in comparison.runs]
    models = [(label, {_key(e): e for e in excerpts}) for label, excerpts in found if excerpts]
    if not models:
        return Html("")
    texts: dict[tuple[str, str], Excerpt] = {}
    for _, own in models:
        texts = own | texts
    lead = "One held-out text of each language, what each model chose, and how sure it was, in %."
    heads = [element("th", title, scope="col") for title in ("", "text", "label")]
    head = element("tr", *heads, *run_headings(comparison, [label for label, _ in models]))
    body = [_row(key, texts[key], [own.get(key) for _, own in models]) for key in sorted(texts)]
    table = scrolling(element("thead", head), element("tbody", *body), class_="excerpts")
    summary = element("summary", f"{len(texts)} texts")
    return element(
        "section",
        element("h2", "Held-out texts"),
        element("p", lead, class_="lead"),
        element("details", summary, table, open=len(texts) <= _OPEN),
    )


def _key(excerpt: Excerpt) -> tuple[str, str]:
    return str(excerpt["language"] or ""), str(excerpt["text"])


def _row(key: tuple[str, str], excerpt: Excerpt, own: Sequence[Excerpt | None]) -> Html:
    language, text = key
    heading = slice_heading("language", language) if language else element("th", "", scope="row")
    block = element("p", text, lang=find_tag(language), dir="auto")
    label = ABSENT if excerpt["label"] is None else text_in_own_direction(excerpt["label"])
    cells = [element("td", block, class_="text"), element("td", label)]
    return element("tr", heading, *cells, *map(_choice, own))


def _choice(excerpt: Excerpt | None) -> Html:
    """What a model chose, with a sign that needs no colour."""
    if excerpt is None:
        return element("td", ABSENT, class_="absent")
    sign = ""
    if excerpt["label"] is not None:
        sign = "✓ " if excerpt["prediction"] == excerpt["label"] else "✗ "
    sure = element("span", f" {excerpt['confidence']:.0f}", class_="unit")
    return element("td", sign, text_in_own_direction(excerpt["prediction"]), sure)
