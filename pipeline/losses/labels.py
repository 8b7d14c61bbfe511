"""Learning from labels: cross-entropy at the positions that have one."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.losses.base import Knowledge, Unit
from pipeline.losses.classes import ClassLoss, Picked, Question
from pipeline.targets import UNLABELLED


class CrossEntropy(ClassLoss):
    """-log q(label) at temperature 1, over the class space of the cache where there is one.

    Attributes:
        label_smoothing: share of the label's mass spread evenly over all classes.
    """

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def unit(self) -> Unit:
        return "labels"

    def question(self, knowledge: Knowledge, width: int) -> Question:
        """The label's score against all others; 0 nats where there is no label."""
        targets = knowledge.targets
        num_classes = width if targets is None else targets.num_classes
        labelled = knowledge.label_ids != UNLABELLED

        def answer(picked: Picked) -> Tensor:
            # A row without a label has no score; any number does, since it is masked below.
            score = torch.where(labelled, picked.scores[:, 0], 0.0)
            losses = functional.softplus(picked.others - score)
            if picked.mean is not None:
                uniform = torch.logaddexp(score, picked.others) - picked.mean
                losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * uniform
            return torch.where(labelled, losses, 0.0)

        return Question(
            ids=torch.where(labelled, knowledge.label_ids, num_classes)[:, None],
            num_classes=num_classes,
            answer=answer,
            exclude=True,
            mean=self.label_smoothing > 0.0,
        )
