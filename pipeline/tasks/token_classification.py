"""One tag per word: parts of speech, entities.

    row -> subwords of each word -> Example with a target at the first subword of each word
    own words, the teacher's words -- align --> the words that both have

Teacher and student meet word by word, whatever tokens each of them reads.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.examples import CachedExample, Example, require_same_labels
from pipeline.metrics import Metric
from pipeline.positions import Positions
from pipeline.scores import Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Batch
from pipeline.tasks.classification import Classification
from pipeline.tasks.entities import entity_f1, mark_entities
from pipeline.tasks.texts import NO_LIMIT, ROWS_AT_ONCE


class TokenClassification(Classification):
    """The tag of each word; rows bring `tokens`, the words, and maybe `tags`, one for each.

    An example's segments are the tokens before the first word, of each word (0 where it gives none
    or was cut off; it has no target then), and after the last.

    Attributes:
        max_length: tokens read at most, special tokens included, and never more than the
            tokenizer's model reads; words behind it are cut off, a word that it cuts keeps its tag.
    """

    auto_class: ClassVar = "AutoModelForTokenClassification"
    features: ClassVar = "targets"
    reads: ClassVar = ("tokens",)

    name: Literal["token-classification"] = "token-classification"
    max_length: int | None = Field(default=None, ge=3)

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`; how many words have no target is logged.

        Raises:
            ConfigError: the tokenizer is no fast one.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                "task token-classification: the tokenizer is no fast one, so that its tokens cannot"
                " be told apart by words; choose a model with a tokenizer.json"
            )
        words = lost = 0
        iterator, space = iter(rows), _find_space(tokenizer)
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            tokens = self._tokenize(chunk, tokenizer, space)
            for row, ids, lengths in zip(chunk, *tokens, strict=True):
                example = self._example(row, ids, lengths, carry)
                words += len(lengths) - 2
                lost += len(lengths) - 2 - len(example.target_positions)
                yield example
        if lost:
            logging.getLogger(__name__).warning(
                "token-classification: %s of %s words have no target, because they give no token"
                " or stand behind max_length",
                f"{lost:,}",
                f"{words:,}",
            )

    def metrics(self, scores: Scores) -> list[Metric]:
        """Those of every classification, by word; and F1 of whole entities where labels mark them.

        Entities are those of the words that have a target and a label.
        """
        found = super().metrics(scores)
        labelled = scores.where(scores.label_ids != UNLABELLED)
        if mark_entities(self._known_labels()) and len(labelled.label_ids):
            f1 = entity_f1(self._sentences(labelled))
            if f1 is not None:
                found.insert(2, Metric("entity_f1", f1, "%", "higher"))
        return found

    def align(
        self, own: Example, said: CachedExample, tokenizer: Any, teacher_tokenizer: Any
    ) -> CachedExample:
        """See `Task.align`; a word that one of both does not read is left out.

        Raises:
            MismatchError: they have other words or tags.
        """
        words = own.columns.get("tokens"), said.columns.get("tokens")
        if None not in words and words[0] != words[1]:
            raise MismatchError(
                f"example {own.example_id!r}: has other words than the cached one; give the words"
                " that the teacher read"
            )
        if len(own.segment_lengths) != len(said.segment_lengths):
            raise MismatchError(
                f"example {own.example_id!r}: has {len(own.segment_lengths) - 2} words, the cached"
                f" one {len(said.segment_lengths) - 2}; give the words that the teacher read"
            )
        _, mine, theirs = np.intersect1d(
            _words_of(own), _words_of(said), assume_unique=True, return_indices=True
        )
        require_same_labels(own, own.label_ids[mine], said.label_ids[theirs])
        kept = replace(
            own, target_positions=own.target_positions[mine], label_ids=own.label_ids[mine]
        )
        targets, hidden = said.targets, said.hidden
        if len(theirs) < len(targets):
            rows = torch.from_numpy(theirs)
            targets = targets.select(rows)
            hidden = _SelectedWords(said, rows)
        labels = targets.label_ids.new_tensor(kept.label_ids)
        return CachedExample(
            **vars(kept), targets=replace(targets, label_ids=labels), hidden=hidden
        )

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`.

        Raises:
            MismatchError: a target that is not at the first token of a word.
        """
        _require_words(examples)
        return super().batch(examples, pad_id, positions)

    def row(self, example: Example) -> dict[str, Any]:
        """See `Task.row`; tags are None for words that the teacher did not read."""
        tags: list[int | None] = [None] * (len(example.segment_lengths) - 2)
        for word, label in zip(_words_of(example), example.label_ids.tolist(), strict=True):
            tags[word] = label if label != UNLABELLED else None
        return {**example.columns, "id": example.example_id, "tags": tags}

    def _sentences(self, scores: Scores) -> Iterator[tuple[list[str], list[str]]]:
        """The true and the predicted tags of each example."""
        names = np.array(self._known_labels())
        examples = scores.columns["example_id"]
        starts = np.flatnonzero(examples[1:] != examples[:-1]) + 1
        true, predicted = names[scores.label_ids], names[scores.predictions]
        for one, other in zip(np.split(true, starts), np.split(predicted, starts), strict=True):
            yield one.tolist(), other.tolist()

    def _tokenize(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, space: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids and segment lengths of each row."""
        limit = min(self.max_length or tokenizer.model_max_length, tokenizer.model_max_length)
        side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
        try:
            encoded = tokenizer(
                [[space + word if word.strip() else word for word in _words(row)] for row in rows],
                is_split_into_words=True,
                truncation=limit < NO_LIMIT,
                max_length=min(limit, NO_LIMIT),
            )
        finally:
            tokenizer.truncation_side = side
        ids = [np.array(one, dtype=np.int32) for one in encoded["input_ids"]]
        counts = [len(row["tokens"]) for row in rows]
        return ids, [_segments(encoded.word_ids(i), n) for i, n in enumerate(counts)]

    def _example(
        self, row: Mapping[str, Any], ids: np.ndarray, lengths: np.ndarray, carry: Sequence[str]
    ) -> Example:
        read = np.flatnonzero(lengths[1:-1])
        return Example(
            example_id=str(row["id"]),
            input_ids=ids,
            segment_lengths=lengths,
            target_positions=np.cumsum(lengths, dtype=np.int32)[read],
            label_ids=self._label_ids(row)[read],
            columns={c: row[c] for c in ("split", *carry) if c in row},
        )

    def _label_ids(self, row: Mapping[str, Any]) -> np.ndarray:
        """[words] int32, UNLABELLED where there is no tag."""
        words, tags = row["tokens"], row.get("tags")
        if tags is None:
            return np.full(len(words), UNLABELLED, dtype=np.int32)
        if len(tags) != len(words):
            raise DataError(
                f"example {row['id']}: has {len(tags)} tags for {len(words)} tokens, expected one"
                " for each; mend the data"
            )
        labels = [UNLABELLED if tag is None else int(tag) for tag in tags]
        for label in labels:
            if self.labels is not None and not (
                label == UNLABELLED or 0 <= label < len(self.labels)
            ):
                raise DataError(
                    f"example {row['id']}: tag {label} is outside the label set of"
                    f" {len(self.labels)}; mend the data or task.labels"
                )
        return np.array(labels, dtype=np.int32)


class _SelectedWords(Mapping[str, Tensor]):
    """The hidden states of some of an example's words, each signal read when it is asked for."""

    def __init__(self, said: CachedExample, rows: Tensor) -> None:
        self._said, self._rows = said, rows

    def __getitem__(self, name: str) -> Tensor:
        states = self._said.hidden[name]
        if name == "pooled":
            return states
        if len(states) != len(self._said.target_positions):
            raise MismatchError(
                f"example {self._said.example_id!r}: {name} is cached at some words only, which"
                " cannot be matched with those of another tokenizer; cache with hidden.positions"
                " all"
            )
        return states[self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._said.hidden)

    def __len__(self) -> int:
        return len(self._said.hidden)


def _find_space(tokenizer: Any) -> str:
    """What a word needs before it to be read as within a text: a byte-level BPE has learned " word"
    as one token, and was not told to put the space there itself."""
    spaced = (token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ"))
    word = min((word for word in spaced if word.isascii() and word.isalpha()), default="")
    running = tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"]
    alone = tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return " " if word and running[-len(alone) :] != alone else ""


def _words_of(example: Example) -> np.ndarray:
    """[N] the words that the targets of an example are about."""
    ends = np.cumsum(example.segment_lengths)
    return np.searchsorted(ends, example.target_positions, side="right") - 1


def _require_words(examples: Sequence[Example]) -> None:
    """Compare the positions of all targets with where words begin."""
    segments = np.concatenate([example.segment_lengths for example in examples])
    ends = np.cumsum(segments)
    before = np.cumsum([0, *(len(example.input_ids) for example in examples)])
    counts = [len(example.target_positions) for example in examples]
    positions = np.concatenate([example.target_positions for example in examples])
    positions = positions + np.repeat(before[:-1], counts)
    found = np.searchsorted(ends, positions, side="right").clip(max=len(ends) - 1)
    last = np.cumsum([len(example.segment_lengths) for example in examples])
    first = last - [len(example.segment_lengths) for example in examples]
    wrong = (ends[found] - segments[found] != positions) | (found <= np.repeat(first, counts))
    wrong |= found >= np.repeat(last - 1, counts)
    if wrong.any():
        example = examples[int(np.repeat(np.arange(len(examples)), counts)[wrong][0])]
        raise MismatchError(
            f"example {example.example_id!r}: has a target that is not where a word begins, so that"
            " its tokens and tags do not belong together; cache the teacher again"
        )


def _words(row: Mapping[str, Any]) -> list[str]:
    words = row.get("tokens")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        raise DataError(
            f"example {row['id']}: has {words!r} as its tokens, expected a list of words; map the"
            " right column with data.columns.tokens"
        )
    return words


def _segments(word_ids: Sequence[int | None], words: int) -> np.ndarray:
    """Tokens before the first word, of each word, and after the last; [words + 2] int32."""
    of_words = [place for place, word in enumerate(word_ids) if word is not None]
    end = of_words[-1] + 1 if of_words else len(word_ids)
    segments = np.zeros(words + 2, dtype=np.int32)
    segments[-1] = len(word_ids) - end
    current = 0
    for word in word_ids[:end]:
        current = current if word is None else word + 1
        segments[current] += 1
    return segments
