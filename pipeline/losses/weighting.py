"""Which positions a loss on logits learns from, and how much each of them counts.

Targets at T = 1 -- confidence, entropy --> PositionWeights --> [N] weights --> weighted mean
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import StrictModel
from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Loss
from pipeline.targets import UNLABELLED, Targets


class Keep(StrictModel):
    """Bounds on what the teacher says at T = 1; a position outside of any counts nothing.

    Attributes:
        min_confidence, max_confidence: of the probability of its first choice.
        min_entropy, max_entropy: in nats; see `SparseDistribution.entropy`.
    """

    min_confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    max_confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    min_entropy: float | None = Field(default=None, ge=0.0)
    max_entropy: float | None = Field(default=None, ge=0.0)


class PositionWeights(StrictModel):
    """How much each position counts, by what the teacher says there at T = 1.

    Attributes:
        weight: "confidence", the probability of its first choice; "entropy", as a share of log V:
            more where it is unsure and so says more than a label (as positions are selected by Wang
            et al. 2021); "certainty", 1 minus that (Kwon et al. 2020); "none", all alike.
        keep: positions to learn from, such as those of a confident teacher (Sohn et al. 2020).
    """

    weight: Literal["none", "confidence", "entropy", "certainty"] = "none"
    keep: Keep = Keep()

    def of(self, targets: Targets) -> Tensor:
        """Weights in [0, 1] of N positions, [N]."""
        confidence, entropy = targets.confidence(), targets.at(1.0).entropy()
        share = entropy / torch.tensor(targets.num_classes).log().clamp(min=1e-12)
        weights = {
            "none": torch.ones_like(confidence),
            "confidence": confidence,
            "entropy": share.clamp(0.0, 1.0),
            "certainty": 1.0 - share.clamp(0.0, 1.0),
        }[self.weight]
        for value, least, most in (
            (confidence, self.keep.min_confidence, self.keep.max_confidence),
            (entropy, self.keep.min_entropy, self.keep.max_entropy),
        ):
            if least is not None:
                weights = torch.where(value >= least, weights, 0.0)
            if most is not None:
                weights = torch.where(value <= most, weights, 0.0)
        return weights


class LogitLoss(Loss):
    """A loss on the student's logits, whose positions may count differently.

    The sum of weighted values is divided by the sum of the weights over the whole optimizer step,
    so that they average to 1 and a term keeps its balance with the others however few positions are
    left.

    Attributes:
        positions: how much each counts; None for all alike.
    """

    positions: PositionWeights | None = None

    def weights(self, knowledge: Knowledge) -> Tensor | None:
        if self.positions is None:
            return None
        weights = self.positions.of(self.targets_of(knowledge))
        if self.unit == "labels":
            weights = torch.where(knowledge.label_ids != UNLABELLED, weights, 0.0)
        return weights

    def targets_of(self, knowledge: Knowledge) -> Targets:
        """The teacher's targets.

        Raises:
            ConfigError: there are none.
        """
        if knowledge.targets is None:
            raise ConfigError(
                f"{self.name}: a teacher's targets are needed, found none; give a cache"
            )
        return knowledge.targets


def weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values times weights, [N]; 0 where the weight is 0, whatever the value."""
    if weights is None:
        return values
    weights = weights.to(values)
    return torch.where(weights > 0.0, values, 0.0) * weights
