"""Curves as inline SVG: linear axes with round ticks, one line per run, dashed reference lines.

    Series, Reference -> nice_ticks -> Axis -> draw_chart -> Html

Colours come from the page's style sheet by slot, so that they follow the light or dark scheme; each
slot has a marker shape too, so that nothing is told by colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.markup import Html, element, join

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
SLOTS = 7
DASHES = ("5 4", "9 3 2 3", "2 3")
MARKERS = (  # drawn around the origin, about 8 units across
    "M-3.4,0a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0Z",
    "M-3,-3H3V3H-3Z",
    "M0,-4L3.7,2.8H-3.7Z",
    "M0,-4.2L4.2,0L0,4.2L-4.2,0Z",
    "M0,4L3.7,-2.8H-3.7Z",
)


@dataclass(frozen=True)
class Series:
    """One run's points, (x, y), in order of x; `slot` picks its colour and marker."""

    label: str
    slot: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Reference:
    """A value that does not change over training; `number` picks its dashes."""

    label: str
    value: float
    number: int = 0


@dataclass(frozen=True)
class Axis:
    """A linear map from values to the drawing, with the values that get a tick."""

    title: str
    ticks: Sequence[float]
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies in the drawing."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def text(self, value: float) -> str:
        """A value with as many decimals as tell the ticks apart."""
        return format_tick(value, self.ticks[1] - self.ticks[0])


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten apart) that cover low..high.

    The first is at or below `low` and the last at or above `high`; there are at least two.
    """
    if high <= low:
        margin = abs(low) * 0.05 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def format_tick(value: float, step: float) -> str:
    """A tick's text: decimals by the step, thousands set apart, no negative zero."""
    decimals = 0
    while decimals < 9 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return f"{value + 0.0 if abs(value) > step * 1e-6 else 0.0:,.{decimals}f}"


def draw_chart(
    title: str,
    series: Sequence[Series],
    references: Sequence[Reference],
    x_title: str,
    y_digits: int,
) -> Html:
    """A chart of every finite point of the series, as one <svg> element.

    Args:
        title: what is drawn, for screen readers.
        series: runs; one without points is left out.
        references: dashed horizontal lines; the legend names them.
        x_title: the horizontal axis' title with its unit.
        y_digits: decimals of the values shown when pointing at a point.
    """
    finite = [Series(s.label, s.slot, _finite(s.points)) for s in series]
    drawn = [s for s in finite if s.points]
    references = [r for r in references if math.isfinite(r.value)]
    x_axis, y_axis = _axes(drawn, references, x_title)
    body = join(
        *_grid(x_axis, y_axis),
        *(_reference(r, y_axis) for r in references),
        *(_line(s, x_axis, y_axis, y_digits) for s in drawn),
    )
    return element(
        "svg",
        body,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
        data_xtitle=x_title,
    )


def draw_key(slot: int) -> Html:
    """A run's line and marker on its own, for the legend."""
    line = element("line", x1=0, x2=26, y1=6, y2=6, class_="line")
    group = element("g", line, marker(slot, 13, 6), class_=f"series s{slot % SLOTS}")
    return element("svg", group, class_="key", viewBox="0 0 26 12", aria_hidden="true")


def draw_dashes(number: int) -> Html:
    """A reference's line on its own, for the legend."""
    line = _dashes(number, 0, 26, 6)
    return element("svg", line, class_="key", viewBox="0 0 26 12", aria_hidden="true")


def marker(slot: int, x: float, y: float, *children: str, **attributes: object) -> Html:
    """The slot's marker at a point."""
    shape = MARKERS[slot % len(MARKERS)]
    place = f"translate({x:.1f},{y:.1f})"
    return element("path", *children, d=shape, transform=place, class_="mark", **attributes)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _axes(
    series: Sequence[Series], references: Sequence[Reference], x_title: str
) -> tuple[Axis, Axis]:
    xs = [x for s in series for x, _ in s.points] or [0.0]
    ys = [y for s in series for _, y in s.points] + [r.value for r in references] or [0.0]
    x_ticks = nice_ticks(min(0.0, *xs), max(xs))
    y_ticks = nice_ticks(min(ys), max(ys))
    x_high = max(x_ticks[1], *xs)  # no empty strip to the right of the last point
    x_shown = [tick for tick in x_ticks if tick <= x_high * (1 + 1e-9)]
    x_axis = Axis(x_title, x_shown, x_ticks[0], x_high, LEFT, WIDTH - RIGHT)
    return x_axis, Axis("", y_ticks, y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)


def _grid(x_axis: Axis, y_axis: Axis) -> list[Html]:
    parts = []
    for tick in y_axis.ticks:
        y = f"{y_axis.at(tick):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        text = y_axis.text(tick)
        parts.append(element("text", text, x=LEFT - 8, y=y, dy="0.35em", class_="tick end"))
    bottom = HEIGHT - BOTTOM
    for tick in x_axis.ticks:
        x = f"{x_axis.at(tick):.1f}"
        parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        text = x_axis.text(tick)
        parts.append(element("text", text, x=x, y=bottom + 17, class_="tick middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    title = element("text", x_axis.title, x=middle, y=HEIGHT - 6, class_="title middle")
    return [*parts, title]


def _reference(reference: Reference, y_axis: Axis) -> Html:
    y = y_axis.at(reference.value)
    title = element("title", reference.label)
    return _dashes(reference.number, LEFT, WIDTH - RIGHT, f"{y:.1f}", title)


def _dashes(number: int, start: float, end: float, y: float | str, *children: str) -> Html:
    dashes = DASHES[number % len(DASHES)]
    ends = {"x1": start, "x2": end, "y1": y, "y2": y}
    return element("line", *children, **ends, stroke_dasharray=dashes, class_="reference")


def _line(series: Series, x_axis: Axis, y_axis: Axis, digits: int) -> Html:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = []
    for (x, y), (at_x, at_y) in zip(series.points, places, strict=True):
        shown = f"{y:,.{digits}f}"
        told = f"{series.label}: {shown} at {x:,.6g} {x_axis.title}"
        title = element("title", told)
        marks.append(marker(series.slot, at_x, at_y, title, data_x=f"{x:,.6g}", data_y=shown))
    line = element("polyline", points=points, class_="line")
    return element(
        "g", line, *marks, class_=f"series s{series.slot % SLOTS}", data_label=series.label
    )
