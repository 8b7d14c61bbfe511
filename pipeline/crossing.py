"""A language model that learns from a teacher with another tokenizer: the same text, cut elsewhere.

tokens of both -- ends in the text --> places where both stand after the same characters -- ULD

At such a place both predict how one text goes on, each in pieces of its own. A loss that reads no
ids can compare these predictions; elsewhere there is nothing to compare and the student learns from
its labels alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.cache import TeacherCache
from pipeline.errors import DataError, MismatchError
from pipeline.examples import Example
from pipeline.joining import load_tokenizer
from pipeline.targets import Targets

CROSSED = "cache"  # the name of a teacher whose class space is not the student's


@dataclass(frozen=True)
class Crossing:
    """The teacher of a cache as a student with another tokenizer hears it; a `Collator` asks it.

    Attributes:
        cache: what it said; every example one document, its text carried along.
        tokenizer: the student's.
    """

    cache: TeacherCache
    tokenizer: Any

    @cached_property
    def _teacher_tokenizer(self) -> Any:
        return load_tokenizer(self.cache)

    def ask(self, examples: Sequence[Example], first: Targets | None) -> dict[str, Any]:
        """What it said at the student's own targets; where it said nothing its share is 0."""
        parts, shares = [], []
        for example in examples:
            said = self.cache.by_id(example.example_id)
            found = match_targets(example, said, self.tokenizer, self._teacher_tokenizer)
            parts.append(said.targets.select(torch.from_numpy(found.clip(min=0))))
            shares.append(found >= 0)
        share = torch.from_numpy(np.concatenate(shares)).float()
        heard = {"targets": Targets.cat(parts), "shares": {"targets": share}}
        return {"teachers": {CROSSED: heard}}


def match_targets(
    own: Example, said: Example, tokenizer: Any, teacher_tokenizer: Any
) -> np.ndarray:
    """The teacher's target at the same place of the text as each target of the student.

    Returns:
        [N] int64, the number of the teacher's target, -1 where it has none there.

    Raises:
        DataError: the text is not carried.
        MismatchError: several documents are packed into one example.
    """
    text = own.columns.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"example {own.example_id!r}: its text is not carried, which a student with another"
            " tokenizer needs; add text to data.carry and cache the teacher again"
        )
    for example in (own, said):
        if len(example.segment_lengths) > 1:
            raise MismatchError(
                f"example {example.example_id!r}: holds several documents, which another tokenizer"
                " would pack differently; cache the teacher with task.packing false"
            )
    mine = find_ends(text, own.input_ids, tokenizer)[own.target_positions]
    theirs = find_ends(text, said.input_ids, teacher_tokenizer)[said.target_positions]
    known = np.flatnonzero(theirs >= 0)
    order = known[np.argsort(theirs[known], kind="stable")]
    at = np.searchsorted(theirs[order], mine)
    found = np.full(len(mine), -1, dtype=np.int64)
    inside = np.flatnonzero((at < len(order)) & (mine >= 0))
    same = inside[theirs[order[at[inside]]] == mine[inside]]
    found[same] = order[at[same]]
    return found


def find_ends(text: str, input_ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """How many characters of the text each token and those before it hold, [T] int64.

    -1 where a token ends within a character, as pieces of bytes do; 0 for what stands before the
    text (BOS), one more than the text's length for what stands after it (EOS).

    Raises:
        MismatchError: these are not the text's tokens.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    given = input_ids.tolist()
    start = next((s for s in range(3) if given[s : s + len(ids)] == ids[: len(given) - s]), None)
    if start is None:
        raise MismatchError(
            "a text and its tokens do not belong together; cache the teacher again from the data"
            " that it carries, or give the student the tokenizer that it was trained with"
        )
    ends = np.full(len(given), len(text) + 1, dtype=np.int64)
    ends[:start] = 0
    stops = np.array([stop for _, stop in offsets] + [len(text) + 1], dtype=np.int64)
    whole = np.where(stops[1:] > stops[:-1], stops[:-1], -1)[: len(given) - start]
    ends[start : start + len(whole)] = whole
    return ends
