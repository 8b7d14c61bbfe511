"""Learning from labels: cross-entropy at the positions that have one."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.losses.base import Knowledge, Loss, StudentOutputs, Unit
from pipeline.losses.classes import pick_classes
from pipeline.targets import UNLABELLED


class CrossEntropy(Loss):
    """-log q(label) at temperature 1, over the class space of the cache where there is one.

    Attributes:
        label_smoothing: share of the label's mass spread evenly over all classes.
    """

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def unit(self) -> Unit:
        return "labels"

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return nats per target position, [N], 0 where there is no label."""
        targets = knowledge.targets
        num_classes = student.logits.shape[1] if targets is None else targets.num_classes
        labelled = knowledge.label_ids != UNLABELLED
        ids = torch.where(labelled, knowledge.label_ids, num_classes)[:, None]
        score, others = pick_classes(student.logits, ids, num_classes, exclude=True)
        # A row without a label has no score; any number does, since it is masked below.
        score = torch.where(labelled, score[:, 0], 0.0)
        losses = functional.softplus(others - score)
        if self.label_smoothing:
            mean = student.logits[:, :num_classes].mean(dim=1, dtype=score.dtype)
            uniform = torch.logaddexp(score, others) - mean
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return torch.where(labelled, losses, 0.0)
