"""Answers as the field compares them: exact match and F1 over words, after normalisation.

text -> lower case, without punctuation and articles -> words -> exact match, F1

SQuAD's rules (Rajpurkar et al. 2016), with the articles, the punctuation of every script and, for
languages written without spaces, the characters as words of MLQA's (Lewis et al. 2020).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.scores import Scores

# MLQA's lists; a language that is not here has no articles taken away.
_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": r"\sال^|ال",
}
_UNSPACED = ("zh", "th", "ja")  # MLQA has Chinese alone of these


def normalise_answer(text: str, language: str = "en") -> list[str]:
    """The words of an answer that count.

    Args:
        language: ISO 639-1; "en" is SQuAD's own rule but for punctuation beyond ASCII.
    """
    kept = "".join(c for c in text.lower() if not _is_punctuation(c))
    if language in _ARTICLES:
        kept = re.sub(_ARTICLES[language], " ", kept)
    if language in _UNSPACED:
        return _split_characters(kept)
    return kept.split()


def exact_match(prediction: str, answers: Iterable[str], language: str = "en") -> float:
    """1 where the prediction is one of the answers after normalisation, else 0."""
    words = normalise_answer(prediction, language)
    return float(any(words == normalise_answer(answer, language) for answer in answers))


def answer_f1(prediction: str, answers: Iterable[str], language: str = "en") -> float:
    """F1 over words with the nearest answer, in [0, 1]."""
    words = normalise_answer(prediction, language)
    return max(_f1(words, normalise_answer(answer, language)) for answer in answers)


def pick_answers(scores: Scores) -> Iterator[tuple[str, list[str], str]]:
    """Of each answered question the text of its surest window, the answers and the language."""
    if "answer" not in scores.observed:
        return
    columns, best = scores.columns, dict[str, tuple[float, int]]()
    for place in np.flatnonzero(~np.isnan(scores.observed["score"])).tolist():
        window, name = columns["window"][place], str(columns["example_id"][place])
        question = name if window is None else name.removesuffix(f"@{window}")
        found = (float(scores.observed["score"][place]), place)
        if columns["answers"][place] and found > best.get(question, (-np.inf, 0)):
            best[question] = found
    for _, place in best.values():
        language = str(columns["language"][place]) if "language" in columns else "en"
        yield scores.observed["answer"][place], columns["answers"][place], language


def read_texts(row: Mapping[str, Any]) -> tuple[str, str]:
    """The question and the context of a row.

    Raises:
        DataError: one of them is no text, or empty.
    """
    for column in ("question", "context"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise DataError(
                f"example {row['id']}: has {row.get(column)!r} as its {column}, expected a text;"
                f" map the right column with data.columns.{column}"
            )
    return row["question"], row["context"]


def read_answers(row: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """The texts of a row's answers, and where in the context the first one starts.

    Raises:
        DataError: texts and starts do not go together, or the context has another text there.
    """
    given = row.get("answers") or {}
    if isinstance(given, list):
        given = {key: [one[key] for one in given] for key in ("text", "answer_start")}
    texts, starts = list(given.get("text", [])), list(given.get("answer_start", []))
    if len(texts) != len(starts):
        raise DataError(
            f"example {row['id']}: has {len(texts)} answers and {len(starts)} starts, expected one"
            " for each; mend the data"
        )
    if not texts:
        return [], None
    start = int(starts[0])
    if row["context"][start : start + len(texts[0])] != texts[0]:
        raise DataError(
            f"example {row['id']}: its context has"
            f" {row['context'][start : start + len(texts[0])]!r} at {start}, not the answer"
            f" {texts[0]!r}; mend the data"
        )
    return texts, start


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not prediction or not answer:
        return float(prediction == answer)
    return 2.0 * same / (len(prediction) + len(answer))


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _split_characters(text: str) -> list[str]:
    """Words of ASCII letters and digits as they are, every other character a word of its own."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text)
