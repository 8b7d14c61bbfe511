"""Entities are found and counted as the CoNLL evaluation does."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.entities import entity_f1, find_entities, mark_entities

TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC"))]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("O I-PER I-PER", [("PER", 1, 2)]),  # IOB1, or a broken IOB2
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("S-LOC B-PER I-PER E-PER O", [("LOC", 0, 0), ("PER", 1, 3)]),
        ("U-LOC B-PER L-PER I-PER", [("LOC", 0, 0), ("PER", 1, 2), ("PER", 3, 3)]),
        ("B-work-of-art I-work-of-art", [("work-of-art", 0, 1)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_of_a_sentence(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(find_entities(tags.split())) == expected


def test_f1_counts_exact_matches_over_all_sentences() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "B-LOC"]]
    # found 4, expected 3, hits 2
    assert entity_f1(zip(true, predicted, strict=True)) == pytest.approx(100 * 4 / 7)
    assert entity_f1([(["O"], ["O"])]) is None
    assert entity_f1([(["O"], ["B-PER"])]) == 0.0


def test_labels_that_mark_entities_are_told_from_those_that_do_not() -> None:
    assert mark_entities(["O", "B-PER", "I-PER"])
    assert mark_entities(["I-PER", "O"])
    assert not mark_entities(["NOUN", "VERB", "X"])
    assert not mark_entities(["O", "B-PER", "NOUN"])
    assert not mark_entities(["O"])


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_f1_is_that_of_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    true = [[one for one, _ in sentence] for sentence in sentences]
    predicted = [[other for _, other in sentence] for sentence in sentences]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing is to be found
        expected = 100.0 * metrics.f1_score(true, predicted)
    found = entity_f1(zip(true, predicted, strict=True))
    assert (found or 0.0) == pytest.approx(expected)
