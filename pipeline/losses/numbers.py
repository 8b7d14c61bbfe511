"""Learning numbers instead of classes: a model's outputs are what it says, without a softmax."""

from abc import ABC
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Loss, StudentOutputs, Unit
from pipeline.targets import UNLABELLED


class NumberLoss(Loss, ABC):
    """A loss on the outputs of a regression, V numbers at each position."""


class OutputMSE(NumberLoss):
    """Squared difference to the teacher's outputs, the mean over them: raw and not centred."""

    name: Literal["output_mse"] = "output_mse"

    @property
    def unit(self) -> Unit:
        return "targets"

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """See `Loss.per_position`.

        Raises:
            ConfigError: there are no targets, or some outputs were not kept.
        """
        targets = knowledge.targets
        if targets is None or targets.ids.shape[1] < targets.num_classes:
            raise ConfigError(
                f"{self.name}: every output of the teacher is needed; cache it with"
                " targets.top_k: all"
            )
        own = _read(student.logits, targets.num_classes)
        said = targets.logits.new_empty(targets.logits.shape)
        said.scatter_(1, targets.ids.long(), targets.logits)
        return (own - said.to(own)).square().mean(dim=1)


class LabelMSE(NumberLoss):
    """Squared difference to the numbers that the data give, the mean over them; 0 where a target
    has none."""

    name: Literal["label_mse"] = "label_mse"

    @property
    def unit(self) -> Unit:
        return "labels"

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """See `Loss.per_position`.

        Raises:
            ConfigError: the task has no numbers.
        """
        given = knowledge.numbers
        if given is None:
            raise ConfigError(f"{self.name}: the task has no numbers; use sequence-regression")
        own = _read(student.logits, given.shape[1])
        known = ~given.isnan()
        apart = torch.where(known, own - torch.where(known, given, 0.0).to(own), 0.0)
        counts = known.all(dim=1) & (knowledge.label_ids != UNLABELLED)
        return torch.where(counts, apart.square().mean(dim=1), 0.0)


def _read(logits: Tensor, count: int) -> Tensor:
    return logits[:, :count].to(torch.promote_types(logits.dtype, torch.float32))
