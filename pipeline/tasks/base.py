"""The seam of the tasks: rows become examples, examples a batch, scores metrics."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.config import StrictModel, parse_config
from pipeline.errors import ConfigError, did_you_mean
from pipeline.examples import CachedExample, Example, require_same_labels
from pipeline.metrics import Metric
from pipeline.positions import Positions, pick_positions
from pipeline.scores import Inputs, Observation, Scores


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


class Task(StrictModel, ABC):
    """A member of the family: its own configuration and all that differs between tasks."""

    # Class facts.
    auto_class: ClassVar[str]  # the transformers Auto class, e.g. "AutoModelForCausalLM"
    vocabulary: ClassVar[bool]  # whether classes are token ids, and the model has a head over them
    shifted: ClassVar[bool]  # whether the label of a target is the token after its position
    features: ClassVar[Literal["targets", "tokens"]]  # positions whose hidden states are kept
    same_tokens: ClassVar[bool]  # whether a student must read the teacher's very tokens
    # What `Example.segment_lengths` counts: documents, which must not see one another; parts of one
    # text, which do; or streams, each read by a stack of its own (encoder, decoder).
    segments: ClassVar[Literal["documents", "parts", "streams"]] = "parts"
    # Whether classes that are not kept may be drawn.
    draws: ClassVar[bool] = True
    # Whether its knowledge is the pooled vector of each example, which stage one then keeps.
    pooled: ClassVar[bool] = False
    # Whether its V "logits" are the numbers asked for, which stage one then keeps whole and raw.
    numeric: ClassVar[bool] = False
    # Columns that a student with another tokenizer makes its examples from.
    reads: ClassVar[tuple[str, ...]] = ("text",)

    # Settings that decide what is measured, not what is learned: a student may choose its own.
    measured_by: ClassVar[tuple[str, ...]] = ()

    name: str

    @property
    def label_names(self) -> list[str] | None:
        """The names of the labels in order; None for a task whose classes have none."""
        return getattr(self, "labels", None)

    def num_labels(self) -> int | None:
        """Outputs of the classification head; None for a model that has none."""
        return None if self.label_names is None else len(self.label_names)

    def complete(self, config: Any, tokenizer: Any) -> Self:
        """The task with what only the teacher's configuration says; itself, for most.

        Args:
            config: of the teacher, as transformers reads it.
        """
        return self

    def model_settings(self, tokenizer: Any) -> dict[str, Any]:
        """What the task decides of a student's own configuration, by transformers' names."""
        return {}

    def measured(self, settings: Mapping[str, Any]) -> Self:
        """The task with other settings of what is measured.

        Raises:
            ConfigError: a setting that the task does not have, or that decides what is learned.
        """
        for name in settings:
            if name not in self.measured_by:
                raise ConfigError(
                    f"evaluation.task.{name}: is no setting of what {self.name} measures"
                    + (did_you_mean(name, self.measured_by) if self.measured_by else "")
                )
        return parse_config(type(self), {**self.model_dump(), **settings}, "evaluation.task")

    def require_packages(self) -> None:
        """Refuse what will be measured where a package for it is missing, before any work.

        Raises:
            ConfigError: names the extra to install.
        """

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

    def observe(self, seen: Observation) -> dict[str, np.ndarray]:
        """What metrics need beyond the scores of single targets: [N, ...] by name, any type.

        A value of an example stands at its first target (None or nan at the others), or at all.
        """
        return {}

    def recall(self, example: CachedExample, tokenizer: Any) -> dict[str, np.ndarray]:
        """What `observe` would have found of the teacher, as far as its targets tell.

        Args:
            tokenizer: the teacher's.
        """
        return {}

    def model_inputs(self, model: Any, inputs: Inputs) -> Inputs:
        """What a model is called with, of the inputs of a batch; `logits` sees all of them."""
        return inputs

    def logits(self, outputs: Any, inputs: Inputs) -> Tensor:
        """The rows that `Batch.target_index` counts, of what a model returned: [rows, V']."""
        rows: Tensor = outputs.logits.flatten(0, -2)
        return rows

    def numbers(self, examples: Sequence[Example]) -> Tensor | None:
        """The labels of a regression, [N, V] with nan where there are none; None for classes."""
        return None

    def hidden_states(self, outputs: Any) -> Sequence[Tensor]:
        """Embeddings and layers, [B, T, D] each, whose rows `Batch.feature_index` counts."""
        states: Sequence[Tensor] = outputs.hidden_states
        return states

    def equip(self, model: Any, name: str | None = None, revision: str | None = None) -> None:
        """Give a model what the task reads from it beside its transformers class.

        Args:
            name, revision: the folder or hub name that it was opened from; None for a new model.
        """

    def settle(self, model: Any) -> "Task":
        """The task with what its config leaves to the equipped teacher."""
        return self

    def save(self, model: Any, folder: Path) -> None:
        """Write a model so that `from_pretrained` and `equip` find all of it."""
        model.save_pretrained(folder)

    def pool(self, model: Any, last: Tensor, token_mask: Tensor) -> Tensor:
        """The pooled vectors [B, D] of the last hidden states [B, T, D]: their mean over the
        tokens.

        Args:
            model: which the states are of.
            token_mask: [B, T], False where padded.
        """
        return mean_states(last, token_mask)

    def align(
        self, own: Example, said: CachedExample, tokenizer: Any, teacher_tokenizer: Any
    ) -> CachedExample:
        """A student's own example with what the teacher said of the same id.

        Args:
            own: made by the student's tokenizer, maybe from another text.
            said: made by the teacher's.

        Raises:
            MismatchError: they have other labels.
        """
        require_same_labels(own, own.label_ids, said.label_ids)
        labels = said.targets.label_ids.new_tensor(own.label_ids)
        targets = replace(said.targets, label_ids=labels)
        return CachedExample(**vars(own), targets=targets, hidden=said.hidden)

    def row(self, example: Example) -> dict[str, Any]:
        """The row that a cached example was made from, as far as the cache carries it."""
        label = int(example.label_ids[0])
        known = {"id": example.example_id, "label": label if label >= 0 else None}
        return {**example.columns, **known}

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """Pad examples on the right into one batch on the CPU; packed documents stay isolated.

        Args:
            pad_id: the token that fills short rows.
            positions: whose hidden states are kept.
        """
        input_ids, attention_mask = pad_rows([e.input_ids for e in examples], pad_id)
        width = input_ids.shape[1]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        target_index = flat_index([e.target_positions for e in examples], width)
        feature_index = target_index
        if self.features != "targets" or positions != "all":
            feature_index = flat_index(self._kept_features(examples, positions), width)
        return Batch(inputs, target_index, feature_index, examples)

    def number_documents(self, examples: Sequence[Example], positions: Positions) -> Tensor:
        """The document of each feature position of a batch, [M] int64, ascending.

        Positions whose tokens see one another have one number: those of an example, or where
        several documents are packed into one, those of a document.
        """
        numbers, first = [], 0
        for example in examples:
            features = pick_positions(self._features(example), example, positions)
            ends = np.cumsum(example.segment_lengths)
            if self.segments != "documents":
                ends = ends[-1:]
            numbers.append(first + np.searchsorted(ends, features, side="right"))
            first += len(ends)
        return torch.from_numpy(np.concatenate(numbers))

    def count_features(self, examples: Sequence[Example], positions: Positions) -> Tensor:
        """How many feature positions each example has, [B] int64."""
        return torch.tensor([len(kept) for kept in self._kept_features(examples, positions)])

    def _kept_features(self, examples: Sequence[Example], positions: Positions) -> list[np.ndarray]:
        return [pick_positions(self._features(e), e, positions) for e in examples]

    def _features(self, example: Example) -> np.ndarray:
        if self.features == "targets":
            return example.target_positions
        return np.arange(len(example.input_ids))


def pad_rows(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids filled up on the right, [B, T] int64, and a mask that is 1 where they are real."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    filled = np.full(real.shape, pad_id, dtype=np.int64)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(filled), torch.from_numpy(real).long()


def mean_states(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """Mean of [B, T, D] over the tokens that are not padding (mask [B, T]), [B, D], in float32."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    mask = token_mask.to(hidden)
    sums = torch.einsum("btd,bt->bd", hidden, mask)
    return sums / mask.sum(dim=1, keepdim=True).clamp(min=1.0)


def flat_index(positions: Sequence[np.ndarray], width: int) -> Tensor:
    """Indices b * width + t of the positions t of each row b, int64."""
    flat = np.concatenate([np.asarray(p, dtype=np.int64) for p in positions])
    flat += np.repeat(np.arange(len(positions)) * width, [len(p) for p in positions])
    return torch.from_numpy(flat)
