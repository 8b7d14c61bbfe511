"""Language modelling: the teacher's distribution of each next token.

    row -> tokens + which of them are learned -> pieces of at most block_size -> blocks -> Example

A document starts with BOS and ends with EOS where the tokenizer has them. Position t is a target
when the token at t + 1 belongs to the same document and is learned (a prompt is not). With packing,
several documents share a block and are kept apart by position ids that restart: a model must
    isolate them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from pipeline.errors import DataError
from pipeline.examples import Column, Example
from pipeline.metrics import Metric, expected_calibration_error
from pipeline.positions import Positions
from pipeline.scores import Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Batch
from pipeline.tasks.generation import Writer
from pipeline.tasks.prompting import answer_row, prompt_ids, tokenize_rows


@dataclass(frozen=True)
class _Piece:
    """Tokens of one document: their ids, and which of them are learned."""

    name: str
    ids: np.ndarray
    learned: np.ndarray
    columns: Mapping[str, Column]


class CausalLM(Writer):
    """Next-token prediction on text, prompt and completion, or chat.

    Attributes:
        targets, generation: whether completions are the data's, or what the teacher writes after
            each prompt, or after the user's last message.
        block_size: tokens of an example at most.
        packing: fill blocks with several documents, isolated from one another.
        overlong: a document longer than block_size is split into several pieces (nothing is lost),
            truncated on the right, or refused.
    """

    auto_class: ClassVar = "AutoModelForCausalLM"
    vocabulary: ClassVar = True
    shifted: ClassVar = True
    segments: ClassVar = "documents"
    features: ClassVar = "targets"
    same_tokens: ClassVar = True

    name: Literal["causal-lm"] = "causal-lm"
    block_size: int = Field(default=512, ge=2)
    packing: bool = True
    overlong: Literal["split", "truncate", "refuse"] = "split"

    def num_classes(self, tokenizer: Any) -> int:
        """The number of token ids, gaps included."""
        return count_ids(tokenizer)

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`; rows bring `text`, `prompt` and `completion`, or `messages`."""
        pieces = (
            piece
            for row, ids, learned in tokenize_rows(map(answer_row, rows), tokenizer)
            for piece in self._pieces(row, ids, learned, carry)
        )
        groups = self._packed(pieces) if self.packing else ([piece] for piece in pieces)
        for group in groups:
            yield _example(group)

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """See `Writer.prompts`; rows bring `prompt` or `messages`."""
        return [prompt_ids(row, tokenizer) for row in rows], None

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`; position ids restart with each document and there is no mask.

        transformers isolates documents by restarting position ids only where no attention mask is
        given. A causal model never looks ahead, so the padding on the right needs none.
        """
        batch = super().batch(examples, pad_id, positions)
        position_ids = torch.arange(batch.inputs["input_ids"].shape[1]).repeat(len(examples), 1)
        for row, example in zip(position_ids.numpy(), examples, strict=True):
            for start in np.cumsum(example.segment_lengths)[:-1].tolist():
                row[start:] -= row[start]
        inputs = {"input_ids": batch.inputs["input_ids"], "position_ids": position_ids}
        return Batch(inputs, batch.target_index, batch.feature_index, examples)

    def metrics(self, scores: Scores) -> list[Metric]:
        """Loss, perplexity, accuracy, calibration on labels; agreement, KL with the teacher."""
        return language_metrics(scores)

    def _pieces(
        self, row: Mapping[str, Any], ids: np.ndarray, learned: np.ndarray, carry: Sequence[str]
    ) -> Iterator[_Piece]:
        name, size = str(row["id"]), self.block_size
        columns = {column: row.get(column) for column in ("split", *carry) if column in row}
        if len(ids) > size and self.overlong == "refuse":
            raise DataError(
                f"example {name}: is {len(ids):,} tokens long, block_size is {size:,};"
                " raise task.block_size or set task.overlong to split or truncate"
            )
        if len(ids) <= size or self.overlong == "truncate":
            yield _Piece(name, ids[:size], learned[:size], columns)
        elif self.packing:  # cut to fill the blocks
            yield _Piece(name, ids, learned, columns)
        else:
            for start in range(0, len(ids), size):
                stop = start + size
                yield _Piece(f"{name}@{start}", ids[start:stop], learned[start:stop], columns)

    def _packed(self, pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
        """Fill blocks in order; what overfills one opens the next; blocks never mix columns."""
        group: list[_Piece] = []
        room = self.block_size
        for piece in pieces:
            whole = self.overlong != "split" and len(piece.ids) > room
            if group and (whole or piece.columns != group[0].columns):
                yield group
                group, room = [], self.block_size
            start = 0
            while start < len(piece.ids):
                stop = min(start + room, len(piece.ids))
                name = f"{piece.name}@{start}"
                part = _Piece(name, piece.ids[start:stop], piece.learned[start:stop], piece.columns)
                group.append(part)
                room -= stop - start
                start = stop
                if room == 0:
                    yield group
                    group, room = [], self.block_size
        if group:
            yield group


def count_ids(tokenizer: Any) -> int:
    """The number of token ids of a tokenizer, gaps included."""
    return int(max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))


def language_metrics(scores: Scores, perplexity: str = "perplexity") -> list[Metric]:
    """Loss, its exponential, accuracy and calibration on labels; agreement, KL with the teacher."""
    labelled = scores.where(scores.label_ids != UNLABELLED)
    found = []
    if len(labelled.label_ids):
        correct = labelled.predictions == labelled.label_ids
        loss = -float(labelled.label_log_probs.mean())
        ece = expected_calibration_error(labelled.confidence, correct)
        found += [
            Metric("loss", loss, "nats/token", "lower"),
            Metric(perplexity, float(np.exp(loss)), "", "lower"),
            Metric("accuracy", 100.0 * float(correct.mean()), "%", "higher"),
            Metric("ece", ece, "%", "lower"),
        ]
    return found + teacher_metrics(scores)


def teacher_metrics(scores: Scores) -> list[Metric]:
    """Agreement with the teacher's first choice and KL(teacher || model) at T = 1, where known."""
    known = ~np.isnan(scores.agreement)
    found = []
    if known.any():
        agreement = 100.0 * float(scores.agreement[known].mean())
        found.append(Metric("agreement", agreement, "%", "higher"))
    known = ~np.isnan(scores.kl_to_teacher)
    if known.any():
        kl = float(scores.kl_to_teacher[known].mean())
        found.append(Metric("kl_to_teacher", kl, "nats", "lower"))
    return found


def _example(group: Sequence[_Piece]) -> Example:
    ids = np.concatenate([piece.ids for piece in group]).astype(np.int32)
    learned = np.concatenate([piece.learned for piece in group])
    lengths = np.array([len(piece.ids) for piece in group], dtype=np.int32)
    learned[np.cumsum(lengths)[:-1]] = False  # the first token of a document has no distribution
    target_positions = np.flatnonzero(learned[1:]).astype(np.int32)
    return Example(
        example_id=group[0].name,
        input_ids=ids,
        segment_lengths=lengths,
        target_positions=target_positions,
        label_ids=ids[target_positions + 1],
        columns=group[0].columns,
    )
