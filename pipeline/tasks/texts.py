"""Whole texts and pairs of texts: what the tasks share that ask about one.

row -> tokens, cut on the right -> Example -> batch, with token types where there are pairs
"""

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from pipeline.errors import DataError
from pipeline.examples import Example
from pipeline.positions import Positions
from pipeline.scores import Inputs
from pipeline.tasks.base import Batch, Task, flat_index

ROWS_AT_ONCE = 256  # fast tokenizers are several times faster on lists
NO_LIMIT = 10**9  # transformers gives a tokenizer without a limit an astronomic one
_TYPES = "token_type_ids"


class TextTask(Task):
    """A task whose answer is about a whole text, or about a pair of texts.

    Attributes:
        max_length: tokens read at most, special tokens included; what is longer is cut on the
            right (of a pair, the longer text first). Left out, it is what the tokenizer's model
            reads, for teacher and student each by its own tokenizer.
    """

    auto_class: ClassVar = "AutoModelForSequenceClassification"
    vocabulary: ClassVar = False
    shifted: ClassVar = False
    features: ClassVar = "tokens"
    same_tokens: ClassVar = False

    max_length: int | None = Field(default=None, ge=2)

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`; an example's segments are the token types of a pair."""
        iterator = iter(rows)
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            tokens = tokenize_texts(chunk, tokenizer, self.max_length)
            for row, ids, lengths in zip(chunk, *tokens, strict=True):
                labels = np.array(self._label_ids(row), dtype=np.int32)
                yield Example(
                    example_id=str(row["id"]),
                    input_ids=ids,
                    segment_lengths=lengths,
                    target_positions=np.arange(len(labels), dtype=np.int32),
                    label_ids=labels,
                    columns=self._columns(row, carry),
                )

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`; the second text of a pair has token type 1, and both see each other."""
        batch = super().batch(examples, pad_id, positions)
        positions_of = [example.target_positions for example in examples]
        most = max(map(len, positions_of))  # all have as many, but for one that was skipped
        batch = replace(batch, target_index=flat_index(positions_of, most))
        if all(len(example.segment_lengths) == 1 for example in examples):
            return batch
        types = torch.zeros_like(batch.inputs["input_ids"])
        for row, example in enumerate(examples):
            first, last = int(example.segment_lengths[0]), len(example.input_ids)
            types[row, first:last] = 1
        return replace(batch, inputs={**batch.inputs, _TYPES: types})

    def model_inputs(self, model: Any, inputs: Inputs) -> Inputs:
        """See `Task.model_inputs`: a model that knows no token types reads a pair without them."""
        known = _TYPES in inspect.signature(model.forward).parameters
        return {name: tensor for name, tensor in inputs.items() if known or name != _TYPES}

    def _columns(self, row: Mapping[str, Any], carry: Sequence[str]) -> dict[str, Any]:
        return {column: row[column] for column in ("split", *carry) if column in row}

    @abstractmethod
    def _label_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The class of each of an example's targets."""


def tokenize_texts(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and segment lengths (one per text) of each row, cut on the right.

    Args:
        rows: with `id`, `text` and maybe `text_pair`.
        max_length: tokens, special ones included; what the tokenizer's model reads where None.

    Raises:
        DataError: no text, no token, or more than the model reads.
    """
    texts, pairs = read_texts(rows, "text"), None
    if rows[0].get("text_pair") is not None:
        pairs = read_texts(rows, "text_pair")
    limit = max_length
    if limit is None and tokenizer.model_max_length < NO_LIMIT:
        limit = tokenizer.model_max_length
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        encoded = tokenizer(texts, pairs, truncation=limit is not None, max_length=limit)
    finally:
        tokenizer.truncation_side = side
    ids = [np.array(one, dtype=np.int32) for one in encoded["input_ids"]]
    for row, one in zip(rows, ids, strict=True):
        _check_length(row, one, tokenizer)
    types = encoded.get("token_type_ids") if pairs else None
    return ids, [_segments(one, types[i] if types else None) for i, one in enumerate(ids)]


def _segments(ids: np.ndarray, types: Sequence[int] | None) -> np.ndarray:
    second = int(np.sum(types)) if types is not None else 0
    lengths = [len(ids) - second, second] if second else [len(ids)]
    return np.array(lengths, dtype=np.int32)


def read_texts(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The texts of a column.

    Raises:
        DataError: a row has none.
    """
    for row in rows:
        if not isinstance(row.get(column), str):
            raise DataError(
                f"example {row['id']}: has {row.get(column)!r} as its {column}, expected a text;"
                f" map the right column with data.columns.{column}"
            )
    return [row[column] for row in rows]


def _check_length(row: Mapping[str, Any], ids: np.ndarray, tokenizer: Any) -> None:
    if len(ids) == 0:
        raise DataError(f"example {row['id']}: its text gives no token; leave it out of the data")
    if len(ids) > tokenizer.model_max_length:
        raise DataError(
            f"example {row['id']}: is {len(ids):,} tokens long, the model reads"
            f" {tokenizer.model_max_length:,}; set task.max_length to at most that"
        )
