"""More texts than there are: changed copies of training texts, for the teacher to judge.

row -> itself, and copies `<id>~1`, `<id>~2`, ... with words replaced, dropped and swapped

A copy has no label: what it means is for the teacher to say, which reads it like any other text. It
is a pure function of the seed, the row's id and its number, so that a cache of it can be repeated.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.config import StrictModel
from pipeline.errors import DataError
from pipeline.identity import make_generator

_TEXTS = ("text", "text_pair")


class Augmentation(StrictModel):
    """The section `augment` of a data set: changed copies of every training text.

    TinyBERT (Jiao et al. 2020) showed how much of a student's quality such texts bring where data
    are few. Words are replaced by words of other training texts, as often as these occur there
    (Xie et al. 2020 call it a unigram noise); a script without spaces is changed character by
    character.

    Attributes:
        copies: of each row.
        replace, drop: chance of each word.
        swap: chance of each word to change places with the next one.
        seed: another seed makes other copies.
    """

    copies: int = Field(ge=1)
    replace: float = Field(default=0.15, ge=0.0, le=1.0)
    drop: float = Field(default=0.05, ge=0.0, lt=1.0)
    swap: float = Field(default=0.05, ge=0.0, le=1.0)
    seed: int = 0


def augment(
    rows: Iterable[Mapping[str, Any]], settings: Augmentation, words: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Each row of the split `train` followed by its copies; other rows as they are.

    Args:
        words: [n] all words of the training texts, as often as they occur; see `list_words`.
    """
    for row in rows:
        yield dict(row)
        if row["split"] != "train":
            continue
        for number in range(1, settings.copies + 1):
            copy = {**row, "id": f"{row['id']}~{number}"}
            if "label" in row:
                copy["label"] = None
            for column in _TEXTS:
                if row.get(column) is not None:
                    chance = make_generator(settings.seed, copy["id"], column)
                    copy[column] = _change(str(row[column]), settings, words, chance)
            yield copy


def list_words(rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """All words of the training rows' texts, [n] objects.

    Raises:
        DataError: there are none; only tasks of whole texts can be augmented.
    """
    found = [
        word
        for row in rows
        if row["split"] == "train"
        for column in _TEXTS
        if row.get(column) is not None
        for word in _split(str(row[column]))[0]
    ]
    if not found:
        raise DataError("data.augment: the training rows have no text; leave it out for this task")
    return np.array(found, dtype=object)


def _split(text: str) -> tuple[list[str], str]:
    """Words, and what joins them."""
    return (text.split(), " ") if any(map(str.isspace, text.strip())) else (list(text), "")


def _change(
    text: str, settings: Augmentation, words: np.ndarray, chance: np.random.Generator
) -> str:
    own, joint = _split(text)
    fate = chance.random((3, len(own)))
    others = words[chance.integers(0, len(words), len(own))]
    own = [str(others[i]) if fate[0, i] < settings.replace else word for i, word in enumerate(own)]
    for i in range(len(own) - 1):
        if fate[1, i] < settings.swap:
            own[i], own[i + 1] = own[i + 1], own[i]
    kept = [word for i, word in enumerate(own) if fate[2, i] >= settings.drop]
    return joint.join(kept or own[:1])
