"""The page: its curves are the runs', it stands alone, its text is inert."""

import html
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import CE, HOSTILE, KD, PageParser, make_run, measure, three_students

from pipeline.metrics import Metric
from pipeline.report import CacheReport, Comparison, TeacherReport, render_page
from pipeline.report.curves import curve_points
from pipeline.report.rows import format_cells, rows_of, table_columns
from pipeline.report.svg import Reference, Series, draw_chart, format_tick, nice_ticks

# Curves


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_cover_the_range_and_are_few(low: float, spread: float) -> None:
    high = low + spread
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 8
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(mantissa, nice, rel_tol=1e-3) for nice in (1, 2, 2.5, 5, 10))


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.30000000000000004, 0.1, "0.3"), (-0.0, 0.5, "0.0"), (12000.0, 2000.0, "12,000")],
)
def test_a_tick_shows_as_many_decimals_as_tell_it_from_the_next(
    value: float, step: float, text: str
) -> None:
    assert format_tick(value, step) == text


def test_a_chart_holds_every_finite_point_and_the_reference() -> None:
    points = [(float(x), 1.0 / (1 + x)) for x in range(40)]
    chart = draw_chart(
        "loss",
        [Series("a", 0, [*points, (40.0, math.nan)])],
        [Reference("teacher", 0.01)],
        "steps",
        3,
    )
    [line] = re.findall(r'<polyline points="([^"]*)"', chart)
    assert len(line.split()) == 40
    shown = re.findall(r'data-x="([^"]*)" data-y="([^"]*)"', chart)
    assert shown == [(f"{x:g}", f"{y:.3f}") for x, y in points]
    assert chart.count('class="reference"') == 1


def test_a_higher_value_is_drawn_higher_and_later_ones_to_the_right() -> None:
    chart = draw_chart("t", [Series("a", 0, [(0.0, 1.0), (10.0, 2.0)])], [], "steps", 1)
    [line] = re.findall(r'<polyline points="([^"]*)"', chart)
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split(","))) for pair in line.split())
    assert x1 > x0 and y1 < y0


def test_curves_read_held_out_lines_only() -> None:
    lines = [
        {"step": 1, "split": "train", "seconds": 0.5, "loss": 9.0},
        {"step": 2, "split": "eval", "seconds": 90.0, "loss": 5.0},
        {"step": 3, "split": "eval", "seconds": 120.0, "ece": 5.0},
    ]
    assert curve_points(lines, "loss", "step") == [(2, 5.0)]
    assert curve_points(lines, "loss", "seconds", 60.0) == [(1.5, 5.0)]


# The page


def test_the_page_loads_nothing_from_anywhere() -> None:
    page = render_page(three_students())
    parsed = PageParser(page)
    assert "://" not in page and "@import" not in page
    assert not re.search(r"url\(", page)
    assert not parsed.named("link") and not parsed.named("img") and not parsed.named("iframe")
    assert not any({"src", "href", "srcset", "data"} & set(a) for _, a in parsed.tags)
    assert "@font-face" not in page and 'http-equiv="refresh"' not in page
    [policy] = [m["content"] for m in parsed.named("meta") if m.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_the_page_shows_every_number_of_the_table() -> None:
    comparison = three_students()
    shown = PageParser(render_page(comparison)).shown
    for column in table_columns(comparison):
        assert set(format_cells(rows_of(comparison), column)) <= set(shown)


def test_every_text_of_the_page_is_inert() -> None:
    losses = [{**KD, "note": HOSTILE}, CE]
    run = make_run(
        HOSTILE,
        [*measure(loss=3.0, accuracy=1.0), *measure(f"{HOSTILE}={HOSTILE}", loss=1.0)],
        losses,
        task=HOSTILE,
        model={"architecture": HOSTILE, "parameters": 1},
        details={
            "classification_report": {
                HOSTILE: {"precision": 1.0, "recall": 2.0, "f1": 3.0, "support": 4}
            },
            "confusion_matrix": {"labels": [HOSTILE], "counts": [[1]]},
            "environment": {HOSTILE: HOSTILE},
        },
        curve=[{"step": 1, "split": "eval", "seconds": 1.0, "loss": 3.0}],
    )
    teacher = TeacherReport(HOSTILE, 1, [Metric(HOSTILE, 1.0, HOSTILE, "lower")])
    cache = CacheReport(HOSTILE, "digest-1", 1, 1, 1, 1.0, 1.0, 1, {HOSTILE: 1})
    plain = make_run("plain", measure(loss=3.5), [CE])
    page = render_page(Comparison([run, plain], [teacher], [cache], [HOSTILE]))
    parsed = PageParser(page)
    assert len(parsed.named("script")) == 1
    assert "<script>alert" not in page
    assert page.count(html.escape("<script>alert(1)")) > 15
    assert page.count(html.escape("<U+0000><U+001B>[2J<U+009B><U+202E>")) > 15
    assert not {"\x00", "\x1b", "\x9b", "\u202e"} & set(page)
    # A quote of the text never ends an attribute: no attribute is named by the text.
    assert not any("alert" in name for _, attributes in parsed.tags for name in attributes)


def test_text_of_unknown_script_is_isolated_and_finds_its_own_direction() -> None:
    run = make_run("بدون", [*measure(loss=3.0), *measure("language=עברית", loss=1.0)])
    page = render_page(Comparison([run]))
    assert '<bdi dir="auto">بدون</bdi>' in page
    assert '<bdi dir="auto">עברית</bdi>' in page


def test_slices_show_each_models_value_and_the_mean_of_slices() -> None:
    metrics = [
        *measure(accuracy=50.0, macro_f1=1.0),
        *measure("language=yor_Latn", accuracy=31.7),
        *measure("language=eng_Latn", accuracy=68.5),
    ]
    page = render_page(Comparison([make_run("a", metrics)]))
    assert 'data-language="yor_Latn"' in page
    shown = PageParser(page).shown
    assert {"31.7", "68.5", "50.1"} <= set(shown)


def test_a_model_without_any_value_on_the_slices_has_no_column_there() -> None:
    run = make_run("a", [*measure(accuracy=50.0), *measure("language=yor", accuracy=31.7)])
    page = render_page(Comparison([run], [TeacherReport("absent", 1, measure(accuracy=60.0))]))
    table = page.split("By <bdi")[1].split("</table>")[0]
    assert ">a</bdi>" in table and "absent" not in table


def test_a_teacher_that_was_asked_about_some_slices_only_has_these_and_the_page_says_so() -> None:
    metrics = [
        *measure(accuracy=50.0),
        *measure("language=amh_Ethi", accuracy=31.7),
        *measure("language=eng_Latn", accuracy=68.5),
    ]
    asked = [*measure(accuracy=91.2), *measure("language=eng_Latn", accuracy=91.2)]
    page = render_page(Comparison([make_run("a", metrics)], [TeacherReport("big", 1, asked)]))
    assert "The cache asked teacher big about eng_Latn alone." in page
    rows = re.findall(r'data-language="(\w+)".*?</tr>', page)
    assert rows == ["amh_Ethi", "eng_Latn"]
    english = page.split('data-language="eng_Latn"')[1].split("</tr>")[0]
    assert english.index("91.2") < english.index("68.5")
    mean = page.split("Mean of slices")[1].split("</tr>")[0]
    assert "91.2" not in mean and "50.1" in mean


def test_the_teachers_classes_stand_beside_the_students() -> None:
    def found(f1: float) -> dict[str, Any]:
        shares = {"precision": 1.0, "recall": 2.0, "f1": f1, "support": 4}
        return {"classification_report": {"travel": shares}}

    teacher = TeacherReport("big", 1, [], found(71.5))
    page = render_page(Comparison([make_run("a", [], details=found(54.5))], [teacher]))
    table = page.split("By class")[1].split("</table>")[0]
    assert table.index("big") < table.index(">a</bdi>")
    assert table.index("71.5") < table.index("54.5")


def test_a_classification_report_and_what_was_confused_are_shown() -> None:
    details = {
        "classification_report": {
            "travel": {"precision": 61.25, "recall": 49.5, "f1": 54.75, "support": 204}
        },
        "confusion_matrix": {"labels": ["travel"], "counts": [[197]]},
    }
    shown = PageParser(
        render_page(Comparison([make_run("a", measure(accuracy=1.0), details=details)]))
    ).shown
    assert {"61.2", "49.5", "54.8", "204", "197"} <= set(shown)


def test_a_page_without_teacher_cache_curve_or_metrics_can_be_written() -> None:
    assert "No student was measured" in render_page(Comparison([make_run("a", [])]))


def test_the_same_comparison_gives_the_same_bytes() -> None:
    assert render_page(three_students()) == render_page(three_students())
