"""The seam of the tasks: rows become examples, examples a batch, scores metrics."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.config import StrictModel
from pipeline.examples import Example
from pipeline.metrics import Metric
from pipeline.positions import Positions, pick_positions

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples padded together, and where their targets and features stand.

    Attributes:
        inputs: what the model is called with: input_ids, attention_mask, position_ids, ... [B, T].
        target_index: [N] int64, flat index b * T + t of each target position (b for a task with one
            target per example).
        feature_index: [M] int64, flat index of the positions whose hidden states are kept.
        examples: the examples, in batch order.
    """

    inputs: Inputs
    target_index: Tensor
    feature_index: Tensor
    examples: Sequence[Example]


@dataclass(frozen=True)
class Scores:
    """Per-target measurements of a model on held-out examples, [N] each, as float64 unless said.

    Attributes:
        label_ids: int64, -100 where unlabelled.
        predictions: int64, the model's first choice.
        confidence: the probability of that choice.
        label_log_probs: log-probability of the label, 0 where unlabelled.
        kl_to_teacher: KL(teacher || model) at T = 1, nan where there is no teacher.
        agreement: 1 where the model's first choice is the teacher's, nan where there is no teacher.
        columns: column name -> [N] array of the example's column, for slices.
    """

    label_ids: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    label_log_probs: np.ndarray
    kl_to_teacher: np.ndarray
    agreement: np.ndarray
    columns: Mapping[str, np.ndarray]

    def where(self, mask: np.ndarray) -> "Scores":
        """The scores of some of the targets."""
        picked = {k: v[mask] for k, v in vars(self).items() if k != "columns"}
        return Scores(**picked, columns={k: v[mask] for k, v in self.columns.items()})


class Task(StrictModel, ABC):
    """A member of the family: its own configuration and all that differs between tasks."""

    # Class facts. `head`: "tokens" models give [B, T, V] logits, "sequence" models [B, V].
    head: ClassVar[Literal["tokens", "sequence"]]
    auto_class: ClassVar[str]  # the transformers Auto class, e.g. "AutoModelForCausalLM"
    features: ClassVar[Literal["targets", "tokens"]]  # positions whose hidden states are kept
    same_tokens: ClassVar[bool]  # whether a student must read the teacher's very tokens

    name: str

    @abstractmethod
    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """Turn rows of a data set (canonical columns: id, text, label, messages, ...) into
        examples.

        Args:
            rows: see `sources.load_rows` for the canonical columns.
            tokenizer: a transformers tokenizer.
            carry: columns copied into `Example.columns`.

        Raises:
            DataError: a label outside the label set, an example longer than the model, no rows.
        """

    @abstractmethod
    def num_classes(self, tokenizer: Any) -> int:
        """V, the size of the class space."""

    @abstractmethod
    def metrics(self, scores: Scores) -> list[Metric]:
        """The field's standard metrics of one slice."""

    def details(self, scores: Scores) -> dict[str, Any]:
        """Findings for the report that are no single number; JSON values only."""
        return {}

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """Pad examples on the right into one batch on the CPU; packed documents stay isolated.

        Args:
            pad_id: the token that fills short rows.
            positions: whose hidden states are kept.
        """
        lengths = np.array([len(example.input_ids) for example in examples])
        real = np.arange(lengths.max()) < lengths[:, None]
        filled = np.full(real.shape, pad_id, dtype=np.int64)
        for row, example in zip(filled, examples, strict=True):
            row[: len(example.input_ids)] = example.input_ids
        input_ids, attention_mask = torch.from_numpy(filled), torch.from_numpy(real).long()
        width = input_ids.shape[1]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        target_index = _flat_index([e.target_positions for e in examples], width)
        if self.head == "sequence":
            target_index = torch.arange(len(examples))
        feature_index = target_index
        if self.features != "targets" or positions != "all":
            features = [pick_positions(self._features(e), e, positions) for e in examples]
            feature_index = _flat_index(features, width)
        return Batch(inputs, target_index, feature_index, examples)

    def _features(self, example: Example) -> np.ndarray:
        if self.features == "targets":
            return example.target_positions
        return np.arange(len(example.input_ids))


def _flat_index(positions: Sequence[np.ndarray], width: int) -> Tensor:
    flat = np.concatenate([np.asarray(p, dtype=np.int64) for p in positions])
    flat += np.repeat(np.arange(len(positions)) * width, [len(p) for p in positions])
    return torch.from_numpy(flat)
