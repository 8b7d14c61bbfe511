"""Answers are compared as the field compares them, language by language."""

import pytest

from pipeline.tasks.answers import answer_f1, exact_match, normalise_answer


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("The  Cat, a cat!", "en", ["cat", "cat"]),
        ("an-other «quote»", "en", ["another", "quote"]),
        ("El Niño y la niña.", "es", ["niño", "y", "niña"]),
        ("Der Hund des Nachbarn", "de", ["hund", "nachbarn"]),
        ("der Hund", "en", ["der", "hund"]),
        ("The cat", "tr", ["the", "cat"]),
        ("القط", "ar", ["قط"]),
        ("在1998年，北京", "zh", ["在", "1998", "年", "北", "京"]),
        ("A cat।", "hi", ["a", "cat"]),
        ("", "en", []),
    ],
)
def test_what_counts_of_an_answer(text: str, language: str, words: list[str]) -> None:
    assert normalise_answer(text, language) == words


def test_the_nearest_of_several_answers_counts() -> None:
    answers = ["Denver Broncos", "the Broncos of Denver, Colorado"]
    assert exact_match("The Denver Broncos!", answers) == 1.0
    assert exact_match("Broncos", answers) == 0.0
    assert answer_f1("Broncos", answers) == pytest.approx(2 / 3)
    assert answer_f1("Colorado Broncos", answers) == pytest.approx(2 * 2 / (2 + 4))
    assert answer_f1("Carolina", answers) == 0.0


def test_words_are_counted_as_often_as_both_have_them() -> None:
    assert answer_f1("to be to be", ["to be or not"]) == pytest.approx(2 * 2 / 8)
    assert answer_f1("the", ["a"]) == 1.0  # nothing is left of either
    assert answer_f1("the", ["cat"]) == 0.0
    assert answer_f1("北京市", ["北京"], "zh") == pytest.approx(4 / 5)
