"""What a model said on held-out examples: the scores of single targets, and what else was observed.

model + examples -> Observation -- Task.observe --> Scores -- Task.metrics --> metrics
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from pipeline.examples import Example

Inputs = dict[str, Tensor]


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
        columns: column name -> [N] array of the example's column, for slices; `example_id` too.
        observed: what `Task.observe` found, [N, ...] each, of any type.
    """

    label_ids: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    label_log_probs: np.ndarray
    kl_to_teacher: np.ndarray
    agreement: np.ndarray
    columns: Mapping[str, np.ndarray]
    observed: Mapping[str, np.ndarray] = field(default_factory=dict)

    def where(self, mask: np.ndarray) -> "Scores":
        """The scores of some of the targets."""
        picked: dict[str, Any] = {
            name: {key: part[mask] for key, part in value.items()}
            if isinstance(value, Mapping)
            else value[mask]
            for name, value in vars(self).items()
        }
        return Scores(**picked)


@dataclass(frozen=True)
class Observation:
    """What `Task.observe` may look at while examples are scored.

    Attributes:
        model: in evaluation mode; it may be asked again, for instance to generate.
        tokenizer: the model's; None where the caller has none.
        inputs: what the model was called with, on its device.
        outputs: what it returned; its logits have no position where `logits` came in pieces.
        logits: the rows at the targets, [N, V'] float32; None where they came in pieces.
        examples: the examples, in batch order.
    """

    model: nn.Module
    tokenizer: Any
    inputs: Inputs
    outputs: Any
    logits: Tensor | None
    examples: Sequence[Example]
