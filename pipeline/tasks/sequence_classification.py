"""One label per text or pair of texts: topics, sentiment, entailment.

row -> tokens, cut on the right -> Example with one target -> scores -> accuracy, F1, report
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from pipeline.errors import DataError
from pipeline.examples import Example
from pipeline.positions import Positions
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Batch, Scores
from pipeline.tasks.classification import Classification
from pipeline.tasks.excerpts import pick_excerpts
from pipeline.tasks.texts import ROWS_AT_ONCE, tokenize_texts


class SequenceClassification(Classification):
    """The class of a whole text; rows bring `text`, maybe `text_pair`, maybe `label`.

    Attributes:
        max_length: tokens read at most, special tokens included; what is longer is cut on the
            right (of a pair, the longer text first). Left out, it is what the tokenizer's model
            reads, for teacher and student each by its own tokenizer.
    """

    auto_class: ClassVar = "AutoModelForSequenceClassification"
    features: ClassVar = "tokens"

    name: Literal["sequence-classification"] = "sequence-classification"
    max_length: int | None = Field(default=None, ge=2)

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`; an example's segments are the token types of a pair."""
        iterator = iter(rows)
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            tokens = tokenize_texts(chunk, tokenizer, self.max_length)
            for row, ids, lengths in zip(chunk, *tokens, strict=True):
                yield Example(
                    example_id=str(row["id"]),
                    input_ids=ids,
                    segment_lengths=lengths,
                    target_positions=np.zeros(1, dtype=np.int32),
                    label_ids=np.array([self._label_id(row)], dtype=np.int32),
                    columns={c: row[c] for c in ("split", *carry) if c in row},
                )

    def details(self, scores: Scores) -> dict[str, Any]:
        """See `Classification.details`; and some texts, where they are carried."""
        excerpts = pick_excerpts(scores, self._known_labels())
        return super().details(scores) | ({"excerpts": excerpts} if excerpts else {})

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`; the second text of a pair has token type 1, and both see each other."""
        batch = replace(
            super().batch(examples, pad_id, positions), target_index=torch.arange(len(examples))
        )
        if all(len(example.segment_lengths) == 1 for example in examples):
            return batch
        types = torch.zeros_like(batch.inputs["input_ids"])
        for row, example in enumerate(examples):
            first, last = int(example.segment_lengths[0]), len(example.input_ids)
            types[row, first:last] = 1
        return replace(batch, inputs={**batch.inputs, "token_type_ids": types})

    def _label_id(self, row: Mapping[str, Any]) -> int:
        label = row.get("label")
        if label is None:
            return UNLABELLED
        if self.labels is not None and not 0 <= label < len(self.labels):
            raise DataError(
                f"example {row['id']}: label {label} is outside the label set of"
                f" {len(self.labels)} ({', '.join(self.labels)}); mend the data or task.labels"
            )
        return int(label)
