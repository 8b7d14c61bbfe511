"""The terminal's table and the sentences: their numbers are the inputs', and they fit."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import CE, KD, TEACHER, make_run, measure, three_runs, three_students
from rich.cells import cell_len
from rich.console import Console

from pipeline.report import Comparison, TeacherReport
from pipeline.report.findings import config_differences, headline, verdict
from pipeline.report.rows import best_rows, columns_of, format_cells, rows_of, table_columns
from pipeline.report.table import print_table


def text_of(comparison: Comparison, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        print_table(comparison, console)
    return capture.get()


# The table


def test_numbers_in_the_table_equal_the_inputs() -> None:
    lines = text_of(three_students()).splitlines()
    [line] = [line for line in lines if line.startswith("distilled ")]
    assert re.split(r" {2,}", line.removeprefix("distilled").strip()) == [
        "0.61 M",
        "3.670",
        "42.5",
        "3.00 M",
        "1 min 11 s",
    ]


def test_the_teacher_stands_in_the_first_row_of_the_table() -> None:
    rows = rows_of(three_students())
    assert [row.role for row in rows] == ["teacher", "student", "student", "student"]
    assert rows[0].values == {"loss": 2.85, "agreement": 100.0, "parameters": 4.2e6}


def test_a_trained_teachers_own_run_stands_among_the_teachers_and_never_wins() -> None:
    teacher_run = make_run("base", measure(loss=2.0), [], kind="teacher")
    comparison = Comparison([*three_runs(), teacher_run], [TEACHER])
    rows = rows_of(comparison)
    assert [row.label for row in rows][:2] == ["teacher demo", "teacher base (own run)"]
    [loss] = [c for c in table_columns(comparison) if c.name == "loss"]
    assert {rows[i].label for i in best_rows(rows, loss)} == {"larger"}


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=6, unique=True))
def test_best_student_respects_the_direction_of_the_metric(values: list[int]) -> None:
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


def test_students_that_read_the_same_are_best_together() -> None:
    losses = {"a": 3.0004, "b": 2.9996, "c": 3.001}
    rows = rows_of(Comparison([make_run(name, measure(loss=v)) for name, v in losses.items()]))
    [loss] = columns_of(measure(loss=0.0))
    assert {rows[i].label for i in best_rows(rows, loss)} == {"a", "b"}


def test_a_value_that_is_missing_or_not_finite_is_shown_as_absent() -> None:
    comparison = Comparison([make_run("a", measure(loss=math.nan)), make_run("b", measure(loss=2))])
    [loss] = [c for c in table_columns(comparison) if c.name == "loss"]
    assert format_cells(rows_of(comparison), loss) == ["–", "2.000"]


def test_a_small_student_beside_a_large_teacher_keeps_its_size() -> None:
    comparison = Comparison([make_run("a", [])], [TeacherReport("big", 8_190_000_000, [])])
    [parameters] = [c for c in table_columns(comparison) if c.name == "parameters"]
    assert format_cells(rows_of(comparison), parameters) == ["8.19 B", "610.0 k"]


def test_the_stars_of_the_table_mark_the_best_students() -> None:
    printed = text_of(three_students())
    assert "3.410*" in printed and "49.0*" in printed
    assert "2.850*" not in printed and "4.270*" not in printed


@given(
    labels=st.lists(
        st.text("abc-é語", min_size=1, max_size=24), min_size=1, max_size=4, unique=True
    ),
    width=st.integers(40, 130),
)
def test_the_table_fits_the_terminal_and_cuts_no_number(labels: list[str], width: int) -> None:
    values = {"loss": 3.67, "perplexity": 39.2, "agreement": 42.5, "ece": 1.25, "accuracy": 31.0}
    runs = [make_run(label, measure(**values)) for label in labels]
    comparison = Comparison(runs, [TEACHER])
    printed = text_of(comparison, width)
    assert all(cell_len(line) <= width for line in printed.splitlines())
    assert "…" not in printed
    for column in table_columns(comparison):
        for cell in format_cells(rows_of(comparison), column):
            assert cell in printed


def test_eighty_columns_hold_the_losses_of_models_with_names_of_usual_length() -> None:
    lines = text_of(three_students(), 80).splitlines()
    [teacher] = [line for line in lines if line.startswith("teacher demo")]
    assert re.split(r" {2,}", teacher.strip())[1:] == ["4.20 M", "2.850", "100.0", "–", "–"]


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


@pytest.mark.parametrize(
    ("others", "name", "spoken"),
    [
        ({"accuracy": 90.0, "macro_f1": 50.0}, "entity_f1", "an entity F1 of 51.3 %"),
        ({"exact_match": 20.0}, "f1", "an F1 of 51.3 %"),
    ],
)
def test_the_verdict_of_a_finder_is_about_f1(
    others: dict[str, float], name: str, spoken: str
) -> None:
    runs = [
        make_run("labels", measure(loss=1.0, **others, **{name: 35.2}), [CE]),
        make_run("distilled", measure(loss=1.1, **others, **{name: 51.3})),
    ]
    assert spoken in verdict(Comparison(runs, []))


def test_a_student_whose_kd_loss_weighs_nothing_counts_as_learning_from_labels() -> None:
    assert not make_run("x", [], [{**KD, "weight": 0.0}, CE]).is_distilled
    assert make_run("x", [], [KD, CE]).is_distilled


def test_the_headline_counts_only_distilled_students() -> None:
    assert headline(three_students()) == "Teacher demo, distilled into two students"


def test_an_empty_choice_is_no_difference_to_none_and_a_list_reads_as_its_items() -> None:
    first = make_run("a", [], [CE], config={"layers": {}, "languages": ["deu", "yor"]})
    second = make_run("b", [], [CE], config={"languages": []})
    [difference] = config_differences([first, second])
    assert (difference.key, difference.values) == ("languages", ("deu, yor", "–"))


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
