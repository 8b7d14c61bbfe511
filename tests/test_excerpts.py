"""The texts that a classifier's result shows."""

import numpy as np

from pipeline.scores import Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks import SequenceClassification

TASK = SequenceClassification(labels=["sports", "travel"])


def make_scores(columns: dict[str, list[object]], labels: list[int]) -> Scores:
    numbers = np.zeros(len(labels))
    return Scores(
        label_ids=np.array(labels),
        predictions=np.arange(len(labels)) % 2,
        confidence=np.full(len(labels), 0.875),
        label_log_probs=numbers,
        kl_to_teacher=numbers,
        agreement=numbers,
        columns={name: np.array(values, dtype=object) for name, values in columns.items()},
    )


def test_one_text_of_each_language_is_that_of_the_first_id():
    """Whatever order the examples were scored in, so that runs can be compared."""
    columns = {
        "example_id": ["b", "a", "c", "a"],
        "language": ["yor", "yor", "amh", "khm"],
        "text": ["second", "first", "ሀ" * 400, "only"],
    }
    labels = [0, 0, 1, UNLABELLED]
    found = TASK.details(make_scores(columns, labels))["excerpts"]
    assert [excerpt["language"] for excerpt in found] == ["amh", "khm", "yor"]
    amharic, khmer, yoruba = found
    assert amharic["text"] == "ሀ" * 299 + "…" and amharic["label"] == "travel"
    assert khmer["label"] is None and khmer["prediction"] == "travel"
    assert (yoruba["text"], yoruba["label"], yoruba["prediction"]) == ("first", "sports", "travel")
    assert yoruba["confidence"] == 87.5
    turned = {name: values[::-1] for name, values in columns.items()}
    again = TASK.details(make_scores(turned, labels[::-1]))["excerpts"]
    assert [e["text"] for e in again] == [e["text"] for e in found]


def test_without_a_language_some_texts_are_shown_and_without_texts_none():
    ids: list[object] = [f"{number:03}" for number in range(60)]
    columns = {"example_id": ids, "text": ids}
    labels = [0] * 60
    found = TASK.details(make_scores(columns, labels))["excerpts"]
    assert [excerpt["text"] for excerpt in found] == ids[:24]
    assert found[0]["language"] is None
    assert "excerpts" not in TASK.details(make_scores({"example_id": ids}, labels))
