"""What the default codec should come to in every class space, and a token at every scale.

    points -- codec_rows --> rows of the one table     points -- show_goals --> a table by space
    scale  -- scale_rows --> rows of the one table

The goals are for 128,000 classes and more; they stand beside smaller spaces too.
"""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from stages.bench.codecs import Point
from stages.bench.measuring import Row
from stages.bench.spaces import TEMPERATURES, Source

BYTES = {"50": 80.0, "64": 100.0, "128": 195.0, "8 + 4 draws": 32.0, "12 draws": 28.0}
KL, P99, MASS = 3e-4, 2e-3, 1e-3  # at every temperature; no first choice may change
_LINEAR = "≤ 1.10"  # cost per token at any scale
_NAIVE = "int32 + float16"


def codec_rows(sources: Sequence[Source], points: Sequence[Point]) -> list[Row]:
    """Bytes in the largest class space, and the worst errors in any, beside their goals."""
    shown = largest_space(sources)
    naive = {point.kept: point.bytes for point in points if point.record == _NAIVE}
    ours = _default_points(points)
    rows = [
        Row(
            f"{point.kept} kept; {shown}",
            "B/target",
            point.bytes,
            naive[point.kept],
            "int32 ids and float16 logits, nothing else",
            goal=f"≤ {BYTES[point.kept]:.0f} B",
        )
        for point in ours
        if point.source == shown
    ]
    known = [point for point in ours if point.kl]
    worst: list[tuple[str, str, float, list[float]]] = [
        ("mean KL(teacher || decoded)", "nats", KL, [max(p.kl) for p in known]),
        ("99th percentile of that KL", "nats", P99, [max(p.p99) for p in known]),
        ("error of the kept mass", "p", MASS, [p.mass or 0.0 for p in known]),
        ("first choices changed", "share", 0.0, [p.changed or 0.0 for p in known]),
    ]
    return rows + [
        Row(f"codec, worst of all: {what}", unit, max(found), goal=f"≤ {_error(goal)}")
        for what, unit, goal, found in worst
    ]


def scale_rows(scale: Sequence[Mapping[str, float]]) -> list[Row]:
    """What one token costs at the largest scale against the smallest: 1 where cost is linear.

    Args:
        scale: by rising number of `tokens`: `bytes/token`, `written tokens/s`, `read tokens/s`.
    """
    small, large = scale[0], scale[-1]
    against = f"the same at {small['tokens']:,.0f} tokens"
    rows = []
    for what, unit, name in (
        ("takes", "bytes", "bytes/token"),
        ("is written in", "µs", "written tokens/s"),
        ("is read in", "µs", "read tokens/s"),
    ):
        found, base = (
            line[name] if unit == "bytes" else 1e6 / line[name] for line in (large, small)
        )
        label = f"at {large['tokens']:,.0f} tokens a token {what}"
        rows.append(Row(label, unit, found, base, against, goal=_LINEAR))
    return rows


def largest_space(sources: Sequence[Source]) -> str:
    """The name of the largest class space, of a trained one where there are several."""
    spaces = [space for space, _ in sources]
    return max(spaces, key=lambda space: (space.classes, space.trained)).name


def reaches(point: Point) -> bool:
    """Whether a point is within the bytes and the errors."""
    return (
        point.bytes <= BYTES[point.kept]
        and max(point.kl, default=0.0) <= KL
        and max(point.p99, default=0.0) <= P99
        and (point.mass or 0.0) <= MASS
        and not point.changed
    )


def show_goals(sources: Sequence[Source], points: Sequence[Point], console: Console) -> None:
    """Print the default codec beside its goals: one table for each class space."""
    console.print(
        f"the default codec beside its goals: mean KL at most {_error(KL)} nats and 99th"
        f" percentile {_error(P99)} at each temperature, kept mass off by at most {_error(MASS)},"
        " no first choice (top-1) changed; bytes all-in but for the inputs",
        highlight=False,
    )
    for space, certainty in sources:
        console.print(f"\n[bold]{space.name}[/bold]: {space.made}", highlight=False)
        console.print(
            f"entropy {certainty.entropy:.2f} nats, mass of the first 64"
            f" {certainty.top_64:.2f}, of the first {certainty.top_1:.2f};"
            f" loss {certainty.loss:.2f}",
            highlight=False,
        )
        console.print(_goal_table([p for p in _default_points(points) if p.source == space.name]))


def _goal_table(points: Sequence[Point]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("kept", no_wrap=True)
    headings = ["bytes", "goal"]
    for temperature in TEMPERATURES:
        headings += [f"KL T={temperature:g}", "p99"]
    for heading in (*headings, "mass", "top-1", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        cells = [f"{point.bytes:.1f}", f"≤ {BYTES[point.kept]:.0f}"]
        for index in range(len(TEMPERATURES)):
            known = index < len(point.kl)
            cells += [f"{p[index]:.1e}" if known else "" for p in (point.kl, point.p99)]
        cells += [
            "" if x is None else f"{x:.0e}" if x else "0" for x in (point.mass, point.changed)
        ]
        table.add_row(point.kept, *cells, "reached" if reaches(point) else "missed")
    return table


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def _default_points(points: Sequence[Point]) -> list[Point]:
    """Of each space and kind, the first of the default codec: at its own number of levels."""
    found: dict[tuple[str, str], Point] = {}
    for point in points:
        if point.record.startswith("steps"):
            found.setdefault((point.source, point.kept), point)
    return list(found.values())
