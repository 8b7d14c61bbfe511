"""What `inspect` tells about a real cache equals what was written into it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_caches import class_example, language_example, targets_of, write_cache

from pipeline.errors import CacheError
from pipeline.report.survey import entropy_bounds, survey_examples
from pipeline.report.text import isolate, show_invisible
from pipeline.targets import UNLABELLED
from stages.inspect import SAMPLE_EXAMPLES, inspect


def printed(path: Path, example_id: str | None = None, width: int = 200) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        inspect(path, example_id, console)
    return capture.get()


def line_of(output: str, start: str) -> list[str]:
    [line] = [line for line in output.splitlines() if line.strip().startswith(start)]
    return line.strip().removeprefix(start).split()


LOGITS = torch.tensor(
    [
        [0.0, 3.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 2.0, 1.0, 4.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 5.0, 0.0],
    ]
)


@pytest.fixture(scope="module")
def language_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    examples = [language_example("doc-0", [0, 1, 5, 6], LOGITS, kept=3)]
    return write_cache(tmp_path_factory.mktemp("lm") / "cache", examples, shifted=True)


@pytest.fixture(scope="module")
def class_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logits = torch.tensor([[1.0, 3.0, 0.0]])
    examples = [class_example("s-0", logits, 0), class_example("s-1", logits, UNLABELLED)]
    path = tmp_path_factory.mktemp("cls") / "cache"
    names = ["travel", "[b]sports[/b]", "صحة"]
    return write_cache(path, examples, shifted=False, label_names=names)


def test_identity_counts_and_bytes_are_shown_with_shortened_digests(language_cache: Path) -> None:
    output = printed(language_cache)
    assert "a-teacher" in output and "a-source" in output
    assert "0123456789ab" in output and "0123456789abc" not in output
    assert line_of(output, "tokens") == ["4"]
    assert line_of(output, "targets")[:2] == ["3,", "each"]
    assert "the 3 highest of 8 classes" in output


def test_the_rows_of_each_language_are_counted(tmp_path: Path) -> None:
    examples = [class_example(f"s-{number}", LOGITS[:1, :3], 0) for number in range(12)]
    names = ["yor"] * 3 + ["heb"] + ["yor"] * 8
    examples = [replace(e, columns={"language": n}) for e, n in zip(examples, names, strict=True)]
    cache = write_cache(tmp_path / "cache", examples, shifted=False)
    assert "yor 11, heb 1" in printed(cache)


def test_the_teacher_has_the_name_that_it_was_cached_under(
    tmp_path: Path, language_cache: Path
) -> None:
    assert "a-teacher" in line_of(printed(language_cache), "teacher")
    cache = shutil.copytree(language_cache, tmp_path / "cache")
    config = {"teacher": {"model": "some/where/Teacher-8B/"}}
    (cache / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert line_of(printed(cache), "teacher")[0] == "Teacher-8B"


def test_eighty_columns_break_no_number_and_no_choice(language_cache: Path) -> None:
    survey = printed(language_cache, width=80)
    assert len(line_of(survey, "entropy, high")) == 8
    choices = printed(language_cache, "doc-0", width=80)
    probabilities = LOGITS.softmax(-1)
    for token, class_id in (("return", 1), ("def", 2)):
        assert f"{token} {probabilities[0, class_id]:.2f}" in choices


def test_bytes_per_token_by_column_add_up_to_the_whole(language_cache: Path) -> None:
    output = printed(language_cache)
    rows = output.split("bytes/token")[1].split("\n\n")[0].splitlines()[1:]
    numbers = [float(row.split()[-3].replace(",", "")) for row in rows if row.strip()]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.01 * len(numbers))


def test_kept_mass_and_loss_are_those_of_the_dense_distribution(language_cache: Path) -> None:
    output = printed(language_cache)
    kept = LOGITS.softmax(-1).topk(3).values.sum(-1)
    loss = -LOGITS.log_softmax(-1)[range(3), [1, 5, 6]]
    assert float(line_of(output, "kept mass")[-1]) == pytest.approx(float(kept.mean()), abs=1e-4)
    assert float(line_of(output, "kept mass")[3]) == pytest.approx(float(kept.median()), abs=1e-4)
    assert float(line_of(output, "label loss")[-1]) == pytest.approx(float(loss.mean()), abs=1e-3)


def test_an_example_is_shown_token_by_token_with_the_teachers_choices(
    language_cache: Path,
) -> None:
    output = printed(language_cache, "doc-0")
    probabilities = LOGITS.softmax(-1)
    row = next(line for line in output.splitlines() if line.startswith("0 "))
    rest = 1 - float(probabilities[0].topk(3).values.sum())
    expected = f"return {probabilities[0, 1]:.2f}  def {probabilities[0, 2]:.2f}"
    assert expected in row and "<s>" in row
    assert f"{probabilities[0, 1]:.3f}" in row and row.rstrip().endswith(f"{rest:.3f}")


def test_control_characters_of_the_text_never_reach_the_terminal(language_cache: Path) -> None:
    output = printed(language_cache, "doc-0")
    assert "\x1b" not in output
    assert "<U+001B>[31m" in output


def test_right_to_left_text_is_isolated(language_cache: Path) -> None:
    assert "\u2068שלום\u2069" in printed(language_cache, "doc-0")


def test_a_classified_text_is_shown_with_its_class_probabilities(class_cache: Path) -> None:
    output = printed(class_cache, "s-0")
    probabilities = torch.tensor([1.0, 3.0, 0.0]).softmax(-1)
    assert line_of(output, "[b]sports[/b]") == [f"{probabilities[1]:.4f}"]
    assert line_of(output, "travel") == [f"{probabilities[0]:.4f}", "the", "label"]
    assert "yor" in line_of(output, "language")
    assert "all others" not in output


def test_loss_is_measured_on_labelled_targets_only(class_cache: Path) -> None:
    output = printed(class_cache)
    loss = -float(torch.tensor([1.0, 3.0, 0.0]).log_softmax(-1)[0])
    assert "2 targets, 1 with a label" in output
    assert float(line_of(output, "label loss")[-1]) == pytest.approx(loss, abs=1e-3)


def test_entropy_is_exact_where_every_class_is_kept(class_cache: Path) -> None:
    output = printed(class_cache)
    p = torch.tensor([1.0, 3.0, 0.0]).softmax(-1)
    entropy = float(torch.special.entr(p).sum())
    for bound in ("entropy, low", "entropy, high"):
        assert float(line_of(output, bound)[-1]) == pytest.approx(entropy, abs=1e-3)
    assert "low and high are one" in output


def test_a_large_cache_is_sampled_and_says_how_much(tmp_path: Path) -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0]])
    count = SAMPLE_EXAMPLES + 100
    examples = [class_example(f"s-{i}", logits, 0) for i in range(count)]
    path = write_cache(tmp_path / "cache", examples, shifted=False)
    assert f"{SAMPLE_EXAMPLES} of {count} examples (evenly spaced)" in printed(path)


def test_an_unknown_example_is_refused_in_one_line(language_cache: Path) -> None:
    with pytest.raises(CacheError, match=r"no example 'doc-9' among .* first is 'doc-0'") as caught:
        printed(language_cache, "doc-9")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is no cache"):
        printed(tmp_path)


@given(
    st.lists(st.floats(-6, 6), min_size=3, max_size=12),
    st.integers(0, 12),
)
def test_the_bounds_hold_the_teachers_entropy(values: list[float], kept: int) -> None:
    logits = torch.tensor([values])
    kept = min(kept, len(values))
    entropy = float(torch.special.entr(logits.double().softmax(-1)).sum())
    low, high = entropy_bounds(targets_of(logits, kept, [UNLABELLED]).at(1.0))
    assert float(low) <= entropy + 1e-4 and float(high) >= entropy - 1e-4
    if kept == len(values):
        assert float(low) == pytest.approx(entropy, abs=1e-4) == float(high)


def test_a_tail_that_is_spread_evenly_meets_the_upper_bound() -> None:
    logits = torch.tensor([[5.0, 1.0, 1.0, 1.0, 1.0]])
    _, high = entropy_bounds(targets_of(logits, 1, [UNLABELLED]).at(1.0))
    exact = float(torch.special.entr(logits.softmax(-1)).sum())
    assert float(high) == pytest.approx(exact, abs=1e-5)


def test_a_survey_of_nothing_is_empty() -> None:
    survey = survey_examples([])
    assert survey.examples == 0 and len(survey.kept_mass) == 0


@given(st.text())
def test_shown_text_holds_nothing_that_moves_a_cursor_or_turns_a_line(text: str) -> None:
    shown = show_invisible(text)
    assert shown.isprintable() and not any(0x2000 <= ord(c) <= 0x200F for c in shown)


def test_only_text_that_runs_right_to_left_is_wrapped() -> None:
    assert isolate("abc") == "abc"
    assert isolate("שלום") == "\u2068שלום\u2069"
