"""A question and its context as one tokenizer reads them, and how two tokenizers' tokens meet.

context -> cut_windows -> characters of each window
question, window -> read_passage -> Passage: ids, characters of each context token
Passage of one tokenizer, of another -- match_starts, match_ends --> which token is which
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Passage:
    """A question and a context in tokens.

    Attributes:
        ids: [T] int32, as the model reads them.
        first: position of the first of the n context tokens, which follow one another.
        starts, ends: [n] ascending, the characters of the context that each is made of, without
            white space around them.
        whole: whether the end of the context was not cut off.
    """

    ids: np.ndarray
    first: int
    starts: np.ndarray
    ends: np.ndarray
    whole: bool

    def __len__(self) -> int:
        return len(self.starts)

    def find_span(self, start: int, end: int) -> tuple[int, int] | None:
        """Positions of the first and the last token of characters [start, end), None if cut off."""
        if len(self) == 0 or (not self.whole and end > self.ends[-1]):
            return None
        first = np.searchsorted(self.ends, start, side="right")
        last = np.searchsorted(self.starts, end, side="left") - 1
        if not 0 <= first <= last < len(self):
            return None
        return self.first + int(first), self.first + int(last)


def best_span(start: Tensor, end: Tensor, longest: int) -> tuple[int, int, float]:
    """First and last token of the span of the highest start[i] + end[j], i <= j < i + longest.

    Args:
        start, end: [n] scores.
    """
    width = min(longest, len(end))
    later = functional.pad(end, (0, width - 1), value=-torch.inf).unfold(0, width, 1)
    value, place = (start[:, None] + later).flatten().max(dim=0)
    first, more = divmod(int(place), width)
    return first, first + more, float(value)


def match_starts(said: Passage, own: Passage) -> np.ndarray:
    """Of each context token of `said` the one of `own` that holds its first character.

    Returns:
        [n] numbers of context tokens, -1 where `own` was cut off before; what `own` has no token
        for belongs to the next one.
    """
    found = np.searchsorted(own.ends, said.starts, side="right")
    return _without_cut(found, said, own)


def match_ends(said: Passage, own: Passage) -> np.ndarray:
    """Of each context token of `said` the one of `own` that holds its last character; see
    `match_starts`, but what `own` has no token for belongs to the one before."""
    found = np.searchsorted(own.starts, said.ends, side="left") - 1
    return _without_cut(found, said, own)


def read_passage(tokenizer: Any, question: str, context: str, limit: int) -> Passage:
    """Tokenize a question and a context; a question keeps at most half of the limit, and the
    context is cut on the right.

    Args:
        limit: tokens, special ones included.
    """
    with _cutting_right(tokenizer):
        encoded = tokenizer(
            _cut_question(tokenizer, question, limit // 2),
            context,
            truncation="only_second",
            max_length=limit,
            return_offsets_mapping=True,
        )
    places = np.flatnonzero([part == 1 for part in encoded.sequence_ids(0)])
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[places]
    starts, ends = _trim(context, offsets)
    return Passage(
        ids=np.array(encoded["input_ids"], dtype=np.int32),
        first=int(places[0]) if len(places) else len(encoded["input_ids"]),
        starts=starts,
        ends=ends,
        whole=not encoded.encodings[0].overflowing,
    )


def cut_windows(
    tokenizer: Any, question: str, context: str, limit: int, stride: int
) -> Iterator[tuple[int, int]]:
    """Characters [begin, end) of the windows that the context is read in, in order.

    Neighbours share `stride` tokens; a window begins between two words where there is a boundary
    in the first half of these, so that it has the tokens that its words have in the context.
    """
    question = _cut_question(tokenizer, question, limit // 2)
    around = len(tokenizer(question, "")["input_ids"])
    encoded = tokenizer(
        context, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ends = [end for _, end in encoded["offset_mapping"]]
    words = encoded.word_ids(0)
    room = max(limit - around, 2)
    shared = min(stride, room // 2)
    first = 0
    while first + room < len(ends):
        yield (ends[first - 1] if first else 0), ends[first + room - 1]
        then = first + room - shared
        inside = range(then, then + shared // 2)
        first = next((t for t in inside if words[t] != words[t - 1]), then)
    yield (ends[first - 1] if first else 0), len(context)


def _without_cut(found: np.ndarray, said: Passage, own: Passage) -> np.ndarray:
    clipped: np.ndarray = found.clip(0, len(own) - 1)
    if not own.whole:
        clipped[said.starts >= own.ends[-1]] = -1
    return clipped


def _trim(context: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spans without the white space that some tokenizers count to a token; one of nothing else is
    empty."""
    spans = offsets.copy()
    for row, (start, end) in enumerate(offsets.tolist()):
        text = context[start:end]
        spans[row] = end - len(text.lstrip()), start + len(text.rstrip())
    starts, ends = spans[:, 0], np.maximum(spans[:, 0], spans[:, 1])
    return np.maximum.accumulate(starts), np.maximum.accumulate(ends)


def _cut_question(tokenizer: Any, question: str, limit: int) -> str:
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return question if len(offsets) <= limit else question[: offsets[limit - 1][1]]


@contextmanager
def _cutting_right(tokenizer: Any) -> Iterator[None]:
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side
