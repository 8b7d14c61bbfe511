"""Bytes against error as one SVG picture, for the documentation.

    [Point, ...] of one class space and K -- log axes --> named dots, one curve, the goals' corner

The picture stands alone: its colours and fonts are in it, and it reads on white and on black.
"""

import math
from collections.abc import Sequence
from html import escape

from stages.bench.codecs import Point
from stages.bench.goals import BYTES, KL

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 60, 44, 52
_LEAST_KL = 1e-5  # what is less is drawn here
_LETTER, _LINE = 7, 16  # pixels of a name, about
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.small{font-size:12px;fill:#666}"
    ".grid{stroke:#ddd}.curve{fill:none;stroke:#0b63b0;stroke-width:2}"
    ".ours{fill:#0b63b0}.theirs{fill:#b5500b}.goal{fill:#0b63b0;opacity:.1}"
)


def draw_plot(points: Sequence[Point], source: str) -> str:
    """Draw the records of a class space at the K that has a curve; return an SVG document.

    Args:
        points: of the whole table.
        source: the class space.
    """
    steps = [p.kept for p in points if p.source == source and p.record.startswith("steps")]
    kept = max(steps, key=steps.count)
    shown = [p for p in points if (p.source, p.kept) == (source, kept) and p.kl]
    ours = sorted((p.bytes, p.kl[0]) for p in shown if p.record.startswith("steps"))
    across = _Axis(_ticks([p.bytes for p in shown]), LEFT, WIDTH - RIGHT)
    errors = [max(p.kl[0], _LEAST_KL) for p in shown]
    upward = _Axis(_decades(min(errors), max(errors)), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(f'Bytes per target against error: {kept} kept, {source}')}</title>",
        f'<style>{_STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>',
        f'<text x="{LEFT}" y="24">{escape(f"{kept} kept classes, {source}")}</text>',
        *(_tick_across(tick, across) for tick in across.ticks),
        *(_tick_upward(tick, upward) for tick in upward.ticks),
        _goal(BYTES.get(kept), across, upward),
        f'<text class="small" x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        "bytes per target, all-in</text>",
        f'<text class="small" transform="translate(18,{HEIGHT / 2}) rotate(-90)"'
        ' text-anchor="middle">KL(teacher || decoded), nats, T = 1</text>',
        _curve([(across.at(x), upward.at(max(y, _LEAST_KL))) for x, y in ours]),
        *(_dot(point, across, upward) for point in shown),
        *_names(shown, across, upward),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axis:
    """A logarithmic map from values to the drawing."""

    def __init__(self, ticks: Sequence[float], start: float, end: float) -> None:
        self.ticks = ticks
        self._low, self._span = math.log(ticks[0]), math.log(ticks[-1] / ticks[0])
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = (math.log(value) - self._low) / self._span
        return round(self._start + share * (self._end - self._start), 1)


def _ticks(values: Sequence[float]) -> list[float]:
    """Doubling numbers of bytes around all values."""
    low = math.floor(math.log2(min(values) / 25))
    high = math.ceil(math.log2(max(values) / 25))
    return [25 * 2.0**power for power in range(low, max(high, low + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _tick_across(value: float, axis: _Axis) -> str:
    x = axis.at(value)
    return (
        f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="small" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
        f"{value:g}</text>"
    )


def _tick_upward(value: float, axis: _Axis) -> str:
    y = axis.at(value)
    power = f"{math.log10(value):.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    text = f"≤ 10{power}" if value <= _LEAST_KL else f"10{power}"
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="small" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{text}</text>'
    )


def _goal(size: float | None, across: _Axis, upward: _Axis) -> str:
    """The corner of what is small and exact enough."""
    if size is None or not across.ticks[0] < size or not upward.ticks[0] < KL:
        return ""
    x, y = across.at(size), upward.at(KL)
    return (
        f'<rect class="goal" x="{LEFT}" y="{y}" width="{x - LEFT}" height="{HEIGHT - BOTTOM - y}"/>'
        f'<text class="small" x="{LEFT + 8}" y="{HEIGHT - BOTTOM - 10}">goal</text>'
    )


def _curve(places: Sequence[tuple[float, float]]) -> str:
    steps = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="curve" points="{steps}"/>'


def _dot(point: Point, across: _Axis, upward: _Axis) -> str:
    x, y = across.at(point.bytes), upward.at(max(point.kl[0], _LEAST_KL))
    ours = point.rate is not None
    return f'<circle class="{"ours" if ours else "theirs"}" cx="{x}" cy="{y}" r="4"/>'


def _names(points: Sequence[Point], across: _Axis, upward: _Axis) -> list[str]:
    """Names above the dots, higher where another is in the way; of the curve, its default's."""
    named: dict[str, Point] = {}
    for point in points:
        steps = point.record.startswith("steps")  # the default comes first
        named.setdefault("steps, the default" if steps else point.record, point)
    parts: list[str] = []
    placed: list[tuple[float, float, float]] = []  # left, right, y
    for name, point in sorted(named.items(), key=lambda item: item[1].bytes):
        half = len(name) * _LETTER / 2
        x = min(across.at(point.bytes), WIDTH - half - 4)
        y = upward.at(max(point.kl[0], _LEAST_KL)) - 9
        if point.record.startswith("steps"):
            x += half + 10
            y += 13
        while any(
            left < x + half and x - half < right and abs(y - other) < _LINE
            for left, right, other in placed
        ):
            y -= _LINE
        placed.append((x - half, x + half, y))
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{escape(name)}</text>')
    return parts
