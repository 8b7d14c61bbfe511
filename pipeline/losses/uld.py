"""Learning across class spaces: how probability is spread, not over which classes.

Targets -- at(T) --> sorted p | m      student logits [N, V'] -- softmax, sort --> sorted q
both -- differences --> [N] values
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError, ModelError
from pipeline.losses.base import Knowledge, StudentOutputs, Unit
from pipeline.losses.weighting import LogitLoss, weigh


class ULD(LogitLoss):
    """sum_i |p_(i) - q_(i)| of sorted probabilities, times T (Boizard et al. 2024).

    It is the Wasserstein-1 distance where moving mass costs the same between any two classes, and
    reads no ids: the student may have another tokenizer and any number of classes, whose list is
    filled up with zeros. It needs the logits of all classes, because which of the student's come
    first is not known before. It says nothing of which class is which: put cross-entropy beside it.

    Of a truncated record the first K are compared one by one, and the cut-off mass m with all that
    the student has beyond its first K, as one outcome. That is a lower bound of the dense value,
    by at most 2 m, and equal to it where every class is kept.

    Attributes:
        temperature: T, one of those that were cached.
        num_classes: of the student; None for every row of its head, padding included.
    """

    name: Literal["uld"] = "uld"
    temperature: float = Field(default=1.0, gt=0.0)
    num_classes: int | None = Field(default=None, ge=2)

    @property
    def unit(self) -> Unit:
        return "targets"

    @property
    def temperatures_needed(self) -> Sequence[float]:
        return [self.temperature]

    @property
    def gradient_scale(self) -> float:
        return self.temperature

    @property
    def crosses_tokenizers(self) -> bool:
        return True

    @property
    def needs_all_logits(self) -> bool:
        return True

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return T times the distance per target position, [N], between 0 and 2 T.

        Raises:
            ConfigError: there are no targets, they hold draws alone, or the temperature was not
                cached.
            ModelError: the student's head has fewer classes than were said.
        """
        targets = self.targets_of(knowledge)
        if not targets.ids.shape[1]:
            raise ConfigError(
                f"{self.name}: kept classes are needed, the cache holds draws alone; cache the"
                " teacher with targets.top_k above 0"
            )
        teacher = targets.at(self.temperature)
        ordered = teacher.log_probs.sort(dim=1, descending=True).values
        first = ordered.exp()
        mine = self._sort_student(student.logits, first.shape[1])
        absent = functional.pad(ordered == -torch.inf, (0, 1))  # padding of short rows
        mine = mine.masked_fill(absent, 0.0) + functional.pad(
            (mine * absent).sum(dim=1, keepdim=True), (first.shape[1], 0)
        )
        theirs = torch.cat([first, teacher.tail_mass[:, None]], dim=1).to(mine)
        values = self.temperature * (theirs - mine).abs().sum(dim=1)
        return weigh(values, self.weights(knowledge))

    def _sort_student(self, logits: Tensor, first: int) -> Tensor:
        """The student's first K probabilities in order, and the sum of all others: [N, K + 1]."""
        rows, classes = logits.shape[1], self.num_classes or logits.shape[1]
        if classes > rows:
            raise ModelError(
                f"{self.name}: num_classes is {classes:,}, the student's head has {rows:,} rows;"
                " give at most these"
            )
        scores = logits[:, :classes].to(torch.promote_types(logits.dtype, torch.float32))
        probs = torch.softmax(scores / self.temperature, dim=1)
        found = probs.topk(min(first, classes), dim=1).values
        rest = 1.0 - found.sum(dim=1, keepdim=True)
        return torch.cat([functional.pad(found, (0, first - found.shape[1])), rest], dim=1)
