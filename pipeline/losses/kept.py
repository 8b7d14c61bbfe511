"""Losses on the kept classes alone, which need neither a probability nor the tail.

Targets (kept ids and raw logits), student logits at these ids --> [N] values
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Unit
from pipeline.losses.classes import ClassLoss, Picked, Question
from pipeline.targets import Targets


class KeptLoss(ClassLoss):
    """A loss on logits at temperature 1 of the classes that were kept; draws are not read."""

    @property
    def unit(self) -> Unit:
        return "targets"

    def pose(self, knowledge: Knowledge, width: int) -> Question:
        """The comparison of kept logits per target position; 0 where nothing was kept.

        Raises:
            ConfigError: there are no targets, or they hold draws alone.
        """
        targets = self.targets_of(knowledge)
        if not targets.ids.shape[1]:
            raise ConfigError(
                f"{self.name}: kept classes are needed, the cache holds draws alone; cache the"
                " teacher with targets.top_k above 0"
            )
        ids, teacher = self._pick(targets)

        def answer(picked: Picked) -> Tensor:
            # What either side rules out has no logit to compare.
            present = (teacher > -torch.inf) & (picked.scores > -torch.inf)
            own = torch.where(present, picked.scores, 0.0)
            theirs = torch.where(present, teacher, 0.0).to(own.dtype)
            return self._compare(own, theirs, present)

        nothing = ids.masked_fill(teacher == -torch.inf, targets.num_classes)
        return Question(nothing, targets.num_classes, answer)

    def _pick(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Ids and raw logits that are compared, [N, K]."""
        return targets.ids.long(), targets.logits

    @abstractmethod
    def _compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        """Compare raw logits [N, K] where present [N, K], else both are 0: [N]."""


class LogitMSE(KeptLoss):
    """Mean squared difference of the kept logits, after the mean of each side is taken away.

    The limit of the forward KL at high temperature, with all logits (Hinton et al. 2015; Ba and
    Caruana 2014; Kim et al. 2021). Centred, because a shift of all logits changes no probability;
    over the kept classes, so that where the student puts the others is left open: use it beside a
    divergence.
    """

    name: Literal["logit_mse"] = "logit_mse"

    def _compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        count = present.sum(dim=1, keepdim=True).clamp(min=1)
        difference = student - teacher
        centred = difference - difference.sum(dim=1, keepdim=True) / count
        return (torch.where(present, centred, 0.0).square() / count).sum(dim=1)


class Ranking(KeptLoss):
    """The teacher's order of its first classes, the mean over all pairs of them.

    Of each pair the class that the teacher prefers should score higher, by as much as the student
    likes: "logistic" is log(1 + exp(-d)) of the difference d of its scores (RankNet, Burges et al.
    2005), "hinge" max(0, margin - d) (Joachims 2002), which is 0 once the order is clear; over a
    teacher's first classes as in RankDistil (Reddi et al. 2021).

    Attributes:
        form: "logistic" or "hinge".
        depth: how many of the teacher's first kept classes are ranked; work grows with its square.
        margin: of the hinge, in nats.
    """

    name: Literal["ranking"] = "ranking"
    form: Literal["logistic", "hinge"] = "logistic"
    depth: int = Field(default=8, ge=2)
    margin: float = Field(default=1.0, ge=0.0)

    def _pick(self, targets: Targets) -> tuple[Tensor, Tensor]:
        depth = min(self.depth, targets.ids.shape[1])
        logits, columns = targets.logits.topk(depth, dim=1)
        return targets.ids.long().gather(1, columns), logits

    def _compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        ahead = teacher[:, :, None] > teacher[:, None, :]
        ahead &= present[:, :, None] & present[:, None, :]
        difference = student[:, :, None] - student[:, None, :]
        if self.form == "hinge":
            values = functional.relu(self.margin - difference)
        else:
            values = functional.softplus(-difference)
        return (values * ahead).sum(dim=(1, 2)) / ahead.sum(dim=(1, 2)).clamp(min=1)
