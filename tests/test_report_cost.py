"""What the report says a cache cost, and what live teaching would have cost."""

from dataclasses import replace

import pytest
from report_cases import (
    CACHE,
    TEACHER,
    PageParser,
    make_run,
    measure,
    three_runs,
    three_students,
)

from pipeline.report import Comparison, render_page
from pipeline.report.cost import cost_sentence, live_costs


def test_live_teaching_costs_examples_seen_times_forward_seconds_per_example() -> None:
    costs = live_costs(three_students(), CACHE)
    assert [(c.label, c.examples) for c in costs] == [
        ("distilled", 12_000),
        ("larger", 12_000),
    ]
    assert [c.seconds for c in costs] == pytest.approx([60.0, 60.0])


def test_live_teaching_is_priced_only_for_students_of_that_cache() -> None:
    other = make_run("other", measure(loss=3.0), identity={"cache": "digest-2"})
    costs = live_costs(Comparison([*three_runs(), other], [TEACHER], [CACHE]), CACHE)
    assert "other" not in [cost.label for cost in costs]


def test_the_page_tells_what_the_cache_cost_and_what_live_teaching_would_have() -> None:
    shown = " ".join(PageParser(render_page(three_students())).shown)
    assert "40.0 s" in shown and "78.0 MB" in shown and "78.0" in shown
    assert "Computed from the measured capture" in shown and "5.0 ms" in shown
    assert "1 min 00 s" in shown and "2 min 00 s" in shown


def test_a_student_with_tokens_of_its_own_is_priced_by_the_examples_the_teacher_would_read() -> (
    None
):
    training = {"examples_seen": 12_000, "tokens_seen": 900_000_000}
    run = make_run("bag", measure(loss=3.0), training=training)
    [cost] = live_costs(Comparison([run], [TEACHER], [CACHE]), CACHE)
    assert cost.seconds == pytest.approx(60.0)


def test_the_sentence_weighs_one_capture_against_every_step_of_the_students() -> None:
    costs = live_costs(three_students(), CACHE)
    sentence = cost_sentence(costs, CACHE).replace("\N{NO-BREAK SPACE}", " ")
    assert "took 40.0 s and 78 bytes per token" in sentence
    assert "two distilled students, it would have taken 2 min 00 s, 3.0 times as long" in sentence
    short = [replace(cost, seconds=10.0) for cost in costs[:1]]
    assert "10.0 s: less, so this cache pays" in cost_sentence(short, CACHE).replace("\xa0", " ")
    assert "Asked again" not in cost_sentence([], CACHE)


def test_columns_of_less_than_a_hundredth_share_a_line_and_no_byte_is_lost() -> None:
    sizes = {"ids": 30_000_000, "logits": 47_000_000, "a": 600_000, "b": 400_000}
    cache = replace(CACHE, column_bytes=sizes)
    shown = PageParser(render_page(Comparison(three_runs(), [TEACHER], [cache]))).shown
    at = shown.index("2 smaller ones")
    assert shown[at : at + 3] == ["2 smaller ones", "1.0", "1.0 MB"]
    assert "47.0" in shown and "30.0" in shown
