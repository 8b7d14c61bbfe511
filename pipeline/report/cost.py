"""What each cache cost, beside what live teaching would have cost the same students.

CacheReport, runs -> live_costs -> cost_sentence, tables of time and of bytes
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.findings import spell_number
from pipeline.report.markup import Html, element, join
from pipeline.report.model import CacheReport, Comparison
from pipeline.report.rows import Row, format_bytes, format_count, format_seconds
from pipeline.report.sections import row_heading, scrolling


@dataclass(frozen=True)
class LiveCost:
    """What one student's training would have asked of a live teacher, by the measured capture."""

    label: str
    examples: int
    seconds: float


def cost_section(comparison: Comparison) -> Html:
    """What each cache cost, beside what live teaching would have cost the same students."""
    if not comparison.caches:
        return Html("")
    parts = [_cache_cost(comparison, cache) for cache in comparison.caches]
    return element("section", element("h2", "What the cache cost"), *parts)


def live_costs(comparison: Comparison, cache: CacheReport) -> list[LiveCost]:
    """Per distilled student of a cache: examples seen times the teacher's seconds per example.

    Tokens would not do: a student may read other texts of the same examples, in tokens of its own.
    Empty where the forward passes were not timed. Students of labels alone would need no teacher.
    """
    if not cache.forward_seconds or not cache.examples:
        return []
    per_example = cache.forward_seconds / cache.examples
    costs = []
    for run in comparison.runs:
        examples = run.result.training.get("examples_seen")
        if run.is_distilled and examples and run.result.identity.get("cache") == cache.digest:
            costs.append(LiveCost(run.label, int(examples), examples * per_example))
    return costs


def cost_sentence(costs: Sequence[LiveCost], cache: CacheReport) -> str:
    """What the cache cost beside what live teaching of the same students would have."""
    once = (
        f"The teacher was asked once, which took {_unbroken(cache.capture_seconds)} and"
        f" {cache.bytes / max(cache.tokens, 1):,.0f} bytes per token."
    )
    if not costs:
        return once
    live = sum(cost.seconds for cost in costs)
    whom = (
        f"the {spell_number(len(costs))} distilled students" if len(costs) > 1 else "that student"
    )
    asked = f"Asked again at every step of {whom}, it would have taken {_unbroken(live)}"
    times = live / max(cache.capture_seconds, 1e-9)
    if times < 1:
        return f"{once} {asked}: less, so this cache pays with the next student."
    return f"{once} {asked}, {times:,.{1 if times < 100 else 0}f} times as long."


def _unbroken(seconds: float) -> str:
    """A duration that a line does not end within."""
    return format_seconds(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def _cache_cost(comparison: Comparison, cache: CacheReport) -> Html:
    facts = [
        ("Cache", cache.path),
        ("Examples", format_count(cache.examples)),
        ("Tokens read", format_count(cache.tokens)),
        ("Distributions kept", format_count(cache.targets)),
        ("Capture, once", format_seconds(cache.capture_seconds)),
        ("Size", format_bytes(cache.bytes)),
        ("Bytes per token", f"{cache.bytes / max(cache.tokens, 1):,.1f}"),
    ]
    if cache.forward_seconds is not None:
        forward = f"{format_seconds(cache.forward_seconds)} of it"
        facts.insert(5, ("Teacher's forward passes", forward))
    pairs = [element("div", element("dt", k), element("dd", v)) for k, v in facts]
    costs = live_costs(comparison, cache)
    parts = [
        element("p", cost_sentence(costs, cache), class_="told"),
        element("dl", *pairs, class_="facts"),
        _live_cost(comparison, cache, costs),
    ]
    if cache.column_bytes:
        parts.append(_column_bytes(cache))
    return join(*parts)


def _live_cost(comparison: Comparison, cache: CacheReport, costs: Sequence[LiveCost]) -> Html:
    if not costs or cache.forward_seconds is None:
        return Html("")
    total = sum(cost.seconds for cost in costs)
    per_example = cache.forward_seconds / cache.examples
    lead = (
        "Computed from the measured capture: every example a distilled student saw, epochs"
        f" included, times the teacher's {format_seconds(per_example)} of forward pass per example."
        " Students that learn from labels alone would need no teacher and are left out."
    )
    body = [
        element(
            "tr",
            row_heading(comparison, Row(cost.label, "student", {})),
            element("td", f"{cost.examples:,}"),
            element("td", format_seconds(cost.seconds)),
        )
        for cost in costs
    ]
    for label, seconds in (
        ("All of them, live", total),
        ("The cache, once", cache.capture_seconds),
    ):
        cells = [element("th", label, scope="row"), element("td", "")]
        shown = element("td", format_seconds(seconds))
        body.append(element("tr", *cells, shown, class_="total"))
    headings = ("", "Examples seen", "Teacher's time")
    head = element("tr", *(element("th", text, scope="col") for text in headings))
    heading = element("h3", "Had the teacher taught live")
    table = scrolling(element("thead", head), element("tbody", *body), class_="narrow")
    return join(heading, element("p", lead, class_="lead"), table)


def _column_bytes(cache: CacheReport) -> Html:
    """Columns from the largest to the smallest; those of less than 1 % in one line."""
    whole = sum(cache.column_bytes.values())
    columns = sorted(cache.column_bytes.items(), key=lambda item: -item[1])
    small = [count for _, count in columns if count < whole / 100]
    if len(small) > 1:
        columns[-len(small) :] = [(f"{len(small)} smaller ones", sum(small))]
    largest = max(*(count for _, count in columns), 1)
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            element("td", f"{count / max(cache.tokens, 1):,.1f}"),
            element("td", format_bytes(count)),
            element("td", element("i", "", style=f"width:{100 * count / largest:.1f}%")),
        )
        for name, count in columns
    ]
    headings = ("Column", "Bytes per token", "Size", "")
    head = element("tr", *(element("th", text, scope="col") for text in headings))
    table = scrolling(element("thead", head), element("tbody", *body), class_="narrow bars")
    return join(element("h3", "Where the bytes are"), table)
