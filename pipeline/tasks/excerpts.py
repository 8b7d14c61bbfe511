"""Some held-out texts with what a model made of them, for people to read.

scores with the texts that were carried along -> one text for each language
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.examples import LANGUAGE_COLUMNS
from pipeline.scores import Scores
from pipeline.targets import UNLABELLED

_LONGEST = 300  # characters of a text
_MOST = 24  # texts where there is no language


def pick_excerpts(scores: Scores, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One text of each language, that of the first example id, so that all models have the same.

    Args:
        scores: of a task with one target per example; nothing is picked where no text is carried.

    Returns:
        JSON values: language (None where there is none), text, label (None if unlabelled),
        prediction, and confidence in percent.
    """
    if "text" not in scores.columns:
        return []
    column = next((name for name in LANGUAGE_COLUMNS if name in scores.columns), None)
    places = sorted(range(len(scores.predictions)), key=lambda i: str(_at(scores, "example_id", i)))
    first: dict[object, int] = {}
    for place in places:
        first.setdefault(_at(scores, column, place) if column else place, place)
    picked = list(first.values()) if column else places[:_MOST]
    found = [_describe(scores, place, column, labels) for place in picked]
    return sorted(found, key=lambda excerpt: str(excerpt["language"]))


def _describe(
    scores: Scores, place: int, column: str | None, labels: Sequence[str]
) -> dict[str, Any]:
    text, label = str(_at(scores, "text", place)), int(scores.label_ids[place])
    language = _at(scores, column, place) if column else None
    return {
        "language": None if language is None else str(language),
        "text": text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…",
        "label": None if label == UNLABELLED else labels[label],
        "prediction": labels[int(scores.predictions[place])],
        "confidence": round(100.0 * float(scores.confidence[place]), 1),
    }


def _at(scores: Scores, column: str, place: int) -> object:
    values: np.ndarray = scores.columns[column]
    return values[place]
