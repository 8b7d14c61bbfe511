"""The comparison: its numbers are the inputs' numbers, its page stands alone, its text is inert."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.metrics import Direction, Metric
from pipeline.report import CacheReport, Comparison, RunReport, TeacherReport, render_page
from pipeline.report.curves import curve_points
from pipeline.report.findings import config_differences, headline, live_costs, verdict
from pipeline.report.rows import best_rows, columns_of, format_cells, rows_of, table_columns
from pipeline.report.svg import Reference, Series, draw_chart, format_tick, nice_ticks
from pipeline.report.table import print_table
from pipeline.runs import Result

UNITS: dict[str, tuple[str, Direction]] = {
    "loss": ("nats/token", "lower"),
    "perplexity": ("", "lower"),
    "agreement": ("%", "higher"),
    "accuracy": ("%", "higher"),
    "macro_f1": ("%", "higher"),
    "ece": ("%", "lower"),
}
KD = {"name": "forward_kl", "weight": 0.9, "temperature": 1.0}
CE = {"name": "cross_entropy", "weight": 1.0}
HOSTILE = "<script>alert(1)</script>\"'&"


def measure(slice: str = "all", **values: float) -> list[Metric]:
    return [Metric(name, value, *UNITS[name], slice) for name, value in values.items()]


def make_run(
    label: str,
    metrics: Sequence[Metric],
    losses: Sequence[Mapping[str, Any]] = (KD, CE),
    **changes: Any,
) -> RunReport:
    fields: dict[str, Any] = {
        "name": label,
        "kind": "student",
        "task": "causal-lm",
        "config": {"cache": "caches/demo", "output": f"runs/{label}", "losses": list(losses)},
        "identity": {"cache": "digest-1"},
        "model": {"architecture": "llama", "parameters": 610_000},
        "training": {"steps": 800, "tokens_seen": 3_000_000, "seconds": 71.25, "device": "cpu"},
        "metrics": list(metrics),
        "details": {},
    }
    curve = changes.pop("curve", [])
    return RunReport(label, Result(**{**fields, **changes}), curve)


TEACHER = TeacherReport("demo-teacher", 4_200_000, measure(loss=2.85, agreement=100.0))
CACHE = CacheReport(
    path="caches/demo",
    digest="digest-1",
    tokens=1_000_000,
    targets=900_000,
    capture_seconds=40.0,
    forward_seconds=20.0,
    bytes=78_000_000,
    column_bytes={"ids": 30_000_000, "logits": 40_000_000},
)


def three_runs() -> list[RunReport]:
    curve = [
        {"step": 50 * i, "epoch": i, "split": "eval", "seconds": 10.0 * i, "loss": 6.5 - 0.317 * i}
        for i in range(9)
    ]
    return [
        make_run("labels", measure(loss=4.27, agreement=31.25), [CE], curve=curve),
        make_run("distilled", measure(loss=3.67, agreement=42.5), curve=curve),
        make_run(
            "larger",
            measure(loss=3.41, agreement=49.0),
            model={"parameters": 1_420_000},
            curve=curve,
        ),
    ]


def three_students() -> Comparison:
    return Comparison(three_runs(), [TEACHER], [CACHE])


def text_of(comparison: Comparison) -> str:
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        print_table(comparison, console)
    return capture.get()


class PageParser(HTMLParser):
    """Collects what a browser would load or run, and the text it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.shown.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# The table


def test_numbers_in_the_table_equal_the_inputs() -> None:
    lines = text_of(three_students()).splitlines()
    [line] = [line for line in lines if "distilled" in line and "│" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["distilled", "0.61 M", "3.670", "42.5", "3.00 M", "1 min 11 s"]


def test_the_teacher_stands_in_the_first_row_of_the_table() -> None:
    rows = rows_of(three_students())
    assert [row.role for row in rows] == ["teacher", "student", "student", "student"]
    assert rows[0].values == {"loss": 2.85, "agreement": 100.0, "parameters": 4.2e6}


def test_a_trained_teachers_own_run_stands_among_the_teachers_and_never_wins() -> None:
    teacher_run = make_run("base", measure(loss=2.0), [], kind="teacher")
    comparison = Comparison([*three_runs(), teacher_run], [TEACHER])
    rows = rows_of(comparison)
    assert [row.label for row in rows][:2] == ["demo-teacher", "base"]
    [loss] = [c for c in table_columns(comparison) if c.name == "loss"]
    assert {rows[i].label for i in best_rows(rows, loss)} == {"larger"}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6, unique=True))
def test_best_student_respects_the_direction_of_the_metric(values: list[float]) -> None:
    runs = [make_run(str(i), measure(loss=v, agreement=v)) for i, v in enumerate(values)]
    comparison = Comparison(runs, [TEACHER])
    rows = rows_of(comparison)
    columns = {c.name: c for c in table_columns(comparison)}
    [lowest] = best_rows(rows, columns["loss"])
    [highest] = best_rows(rows, columns["agreement"])
    assert rows[lowest].values["loss"] == min(values)
    assert rows[highest].values["agreement"] == max(values)
    assert best_rows(rows, columns["parameters"]) == set()


def test_no_student_is_best_where_all_are_equal_or_only_one_was_measured() -> None:
    runs = [make_run("a", measure(loss=3.0, ece=1.0)), make_run("b", measure(loss=3.0))]
    rows = rows_of(Comparison(runs))
    for column in columns_of(m for run in runs for m in run.result.metrics):
        assert best_rows(rows, column) == set()


def test_a_value_that_is_missing_or_not_finite_is_shown_as_absent() -> None:
    comparison = Comparison([make_run("a", measure(loss=math.nan)), make_run("b", measure(loss=2))])
    [loss] = [c for c in table_columns(comparison) if c.name == "loss"]
    assert format_cells(rows_of(comparison), loss) == ["–", "2.000"]


def test_the_stars_of_the_table_mark_the_best_students() -> None:
    printed = text_of(three_students())
    assert "3.410*" in printed and "49.0*" in printed
    assert "2.850*" not in printed and "4.270*" not in printed


def test_a_label_with_markup_of_the_terminal_is_printed_as_it_is() -> None:
    comparison = Comparison([make_run("[red]x[/red]", measure(loss=1.0))])
    assert "[red]x[/red]" in text_of(comparison)


# Findings


def test_the_verdict_compares_students_of_the_same_size_and_states_the_closed_gap() -> None:
    sentence = verdict(three_students())
    assert "“distilled” reaches a loss of 3.670 nats/token" in sentence
    assert "4.270 nats/token for “labels”, a student of the same size" in sentence
    assert "42 % of the distance to the teacher's 2.850 nats/token is closed" in sentence


def test_the_verdict_says_so_when_distillation_did_not_help() -> None:
    runs = [
        make_run("labels", measure(loss=3.0), [CE]),
        make_run("distilled", measure(loss=3.1)),
    ]
    assert verdict(Comparison(runs, [TEACHER])).startswith("Distillation did not help here")


def test_the_verdict_of_a_classifier_is_about_accuracy_where_higher_is_better() -> None:
    runs = [
        make_run("labels", measure(loss=1.0, accuracy=35.2, macro_f1=33.0), [CE]),
        make_run("distilled", measure(loss=1.1, accuracy=51.3, macro_f1=49.0)),
    ]
    teacher = TeacherReport("encoder", None, measure(accuracy=73.5))
    sentence = verdict(Comparison(runs, [teacher]))
    assert "an accuracy of 51.3 %" in sentence and "against 35.2 %" in sentence
    assert "42 % of the distance to the teacher's 73.5 % is closed" in sentence


def test_a_student_whose_kd_loss_weighs_nothing_counts_as_learning_from_labels() -> None:
    assert not make_run("x", [], [{**KD, "weight": 0.0}, CE]).is_distilled
    assert make_run("x", [], [KD, CE]).is_distilled


def test_the_headline_counts_only_distilled_students() -> None:
    assert headline(three_students()) == "demo-teacher, distilled into two students"


def test_live_teaching_costs_tokens_seen_times_forward_seconds_per_token() -> None:
    costs = live_costs(three_students(), CACHE)
    assert [(c.label, c.tokens) for c in costs] == [
        ("distilled", 3_000_000),
        ("larger", 3_000_000),
    ]
    assert [c.seconds for c in costs] == pytest.approx([60.0, 60.0])


def test_live_teaching_is_priced_only_for_students_of_that_cache() -> None:
    other = make_run("other", measure(loss=3.0), identity={"cache": "digest-2"})
    costs = live_costs(Comparison([*three_runs(), other], [TEACHER], [CACHE]), CACHE)
    assert "other" not in [cost.label for cost in costs]


def test_only_config_keys_that_differ_are_listed_whatever_the_order_of_losses() -> None:
    first = make_run("a", [], [KD, CE])
    second = make_run("b", [], [CE, {**KD, "weight": 0.5}])
    [difference] = config_differences([first, second])
    assert (difference.key, difference.values) == ("losses.forward_kl.weight", ("0.9", "0.5"))


def test_a_key_that_one_config_lacks_is_a_difference() -> None:
    found = config_differences([make_run("a", [], [KD, CE]), make_run("b", [], [CE])])
    assert [(d.key, d.values) for d in found] == [
        ("losses.forward_kl.weight", ("0.9", "–")),
        ("losses.forward_kl.temperature", ("1.0", "–")),
    ]


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
    cache = CacheReport(HOSTILE, "digest-1", 1, 1, 1.0, 1.0, 1, {HOSTILE: 1})
    plain = make_run("plain", measure(loss=3.5), [CE])
    page = render_page(Comparison([run, plain], [teacher], [cache], [HOSTILE]))
    parsed = PageParser(page)
    assert len(parsed.named("script")) == 1
    assert "<script>alert" not in page
    assert page.count(html.escape("<script>alert(1)")) > 15
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


def test_the_page_tells_what_the_cache_cost_and_what_live_teaching_would_have() -> None:
    shown = " ".join(PageParser(render_page(three_students())).shown)
    assert "40.0 s" in shown and "78.0 MB" in shown and "78.0" in shown
    assert "Computed from the measured capture" in shown and "20.0 µs" in shown
    assert "1 min 00 s" in shown and "2 min 00 s" in shown


def test_a_page_without_teacher_cache_curve_or_metrics_can_be_written() -> None:
    assert "No student was measured" in render_page(Comparison([make_run("a", [])]))


def test_the_same_comparison_gives_the_same_bytes() -> None:
    assert render_page(three_students()) == render_page(three_students())
