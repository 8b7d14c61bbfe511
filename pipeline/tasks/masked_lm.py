"""Masked language modelling: the teacher's distribution of each token that it cannot see.

    row -> pieces of at most max_length tokens -> maskings of each -> Example per masking

What is masked is drawn once, when the cache is made, and stored: teacher and student read the same
maskings, every epoch again. A masking is a pure function of the seed, the piece and its number.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.examples import Example
from pipeline.identity import make_generator
from pipeline.metrics import Metric
from pipeline.scores import Scores
from pipeline.tasks.base import Task
from pipeline.tasks.causal_lm import count_ids, language_metrics
from pipeline.tasks.texts import NO_LIMIT, ROWS_AT_ONCE, read_texts


@dataclass(frozen=True)
class _Piece:
    """Tokens of a part of one row: their ids, and the word each belongs to (-1: special)."""

    name: str
    ids: np.ndarray
    words: np.ndarray


class MaskedLM(Task):
    """Predicting masked tokens; rows bring `text`.

    A text longer than `max_length` becomes several pieces, so that nothing is lost.

    Attributes:
        max_length: tokens of a piece at most, special ones included; what the tokenizer's model
            reads where left out.
        probability: share of a piece's tokens (words) that a masking hides; at least one.
        maskings: how many of each piece, drawn independently; each is an example of its own,
            `<id>@<piece>#<masking>`.
        whole_words: hide all tokens of a word or none.
        random, keep: shares of the hidden positions that show a random token, or the token itself,
            in place of the mask (Devlin et al. 2019: 0.1 each); they are targets all the same.
        seed: of the maskings.
    """

    auto_class: ClassVar = "AutoModelForMaskedLM"
    vocabulary: ClassVar = True
    shifted: ClassVar = False
    features: ClassVar = "tokens"
    same_tokens: ClassVar = True

    name: Literal["masked-lm"] = "masked-lm"
    max_length: int | None = Field(default=None, ge=3)
    probability: float = Field(default=0.15, gt=0.0, le=1.0)
    maskings: int = Field(default=1, ge=1)
    whole_words: bool = False
    random: float = Field(default=0.1, ge=0.0, le=1.0)
    keep: float = Field(default=0.1, ge=0.0, le=1.0)
    seed: int = 0

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.random + self.keep > 1.0:
            raise ValueError(f"random and keep are {self.random + self.keep:g} together, above 1")
        return self

    def num_classes(self, tokenizer: Any) -> int:
        """The number of token ids, gaps included."""
        return count_ids(tokenizer)

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`.

        Raises:
            ConfigError: the tokenizer has no mask token, is no fast one, or needs `max_length`.
        """
        limit = self._limit(tokenizer)
        ordinary = np.setdiff1d(np.arange(count_ids(tokenizer)), tokenizer.all_special_ids)
        iterator = iter(rows)
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            for row, piece in _pieces(chunk, tokenizer, limit):
                columns = {column: row[column] for column in ("split", *carry) if column in row}
                for number in range(self.maskings):
                    yield self._masked(
                        piece, number, int(tokenizer.mask_token_id), ordinary, columns
                    )

    def metrics(self, scores: Scores) -> list[Metric]:
        """Loss, pseudo-perplexity, accuracy, calibration at the masked positions; agreement, KL.

        The pseudo-perplexity is exp of the mean loss over what the stored maskings hide. That of
        Salazar et al. (2020) hides one token at a time; it is lower, since more can be seen.
        """
        return language_metrics(scores, perplexity="pseudo_perplexity")

    def _limit(self, tokenizer: Any) -> int:
        if tokenizer.mask_token_id is None or not tokenizer.is_fast:
            lack = "has no mask token" if tokenizer.is_fast else "is no fast one"
            raise ConfigError(
                f"task masked-lm: the tokenizer {lack}; choose a model that was trained to fill"
                " masks, with a tokenizer.json"
            )
        if self.max_length is not None:
            return self.max_length
        if tokenizer.model_max_length >= NO_LIMIT:
            raise ConfigError(
                "task.max_length: the tokenizer does not say how much its model reads; set it"
            )
        return int(tokenizer.model_max_length)

    def _masked(
        self,
        piece: _Piece,
        number: int,
        mask_id: int,
        ordinary: np.ndarray,
        columns: Mapping[str, Any],
    ) -> Example:
        chance = make_generator(self.seed, piece.name, number)
        positions = self._hidden(piece.words, chance)
        ids = piece.ids.copy()
        fate = chance.random(len(positions))
        ids[positions[fate >= self.random + self.keep]] = mask_id
        changed = positions[fate < self.random]
        ids[changed] = chance.choice(ordinary, len(changed))
        return Example(
            example_id=f"{piece.name}#{number}",
            input_ids=ids,
            segment_lengths=np.array([len(ids)], dtype=np.int32),
            target_positions=positions.astype(np.int32),
            label_ids=piece.ids[positions],
            columns=columns,
        )

    def _hidden(self, words: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """Positions to hide, ascending; of whole words, as many as come nearest to the share."""
        units = words if self.whole_words else np.where(words >= 0, np.arange(len(words)), -1)
        names, sizes = np.unique(units[units >= 0], return_counts=True)
        order = chance.permutation(len(names))
        wanted = self.probability * sizes.sum()
        count = int(np.abs(np.cumsum(sizes[order]) - wanted).argmin()) + 1
        return np.flatnonzero(np.isin(units, names[order[:count]]))


def _pieces(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, limit: int
) -> Iterator[tuple[Mapping[str, Any], _Piece]]:
    """The pieces of each row that hold anything to mask, in order."""
    encoded = tokenizer(
        read_texts(rows, "text"),
        truncation=True,
        max_length=limit,
        return_overflowing_tokens=True,
    )
    counts = [0] * len(rows)
    owners = encoded["overflow_to_sample_mapping"]
    for index, (owner, ids) in enumerate(zip(owners, encoded["input_ids"], strict=True)):
        words = np.array([-1 if w is None else w for w in encoded.word_ids(index)])
        name = f"{rows[owner]['id']}@{counts[owner]}"
        counts[owner] += 1
        if (words >= 0).any():
            yield rows[owner], _Piece(name, np.array(ids, dtype=np.int32), words)
