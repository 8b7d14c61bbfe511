"""Learning from hidden states: a projected student layer against a teacher layer, or the pooled
vectors of the two.

    student [M, D] -- projection --> [M, D_teacher] -- compare --> [M], the mean over layer pairs
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, StudentOutputs
from pipeline.losses.layers import LayerLoss


class HiddenLoss(LayerLoss):
    """What the comparisons of hidden states share: how widths are matched.

    Attributes:
        projection: "linear", a learned map from the student's width to the teacher's for each
            pair, or "none", for equal widths.
    """

    projection: Literal["linear", "none"] = "linear"

    def projections(self, student_width: int, teacher_width: int) -> nn.ModuleDict:
        """One linear map per pair, drawn from torch's global generator; none for "none".

        Raises:
            ConfigError: `projection: none` with unequal widths.
        """
        if self.projection == "none":
            if student_width != teacher_width:
                raise ConfigError(
                    f"{self.name}: projection: none, but the student is {student_width} wide and"
                    f" the teacher {teacher_width}; use projection: linear"
                )
            return nn.ModuleDict()
        maps = {_key(signal): nn.Linear(student_width, teacher_width) for signal in self.compares}
        return nn.ModuleDict(maps)

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return the mean over the pairs, [M] (or [B] for pooled)."""
        values = [
            self.compare(_project(mine, projections, _key(signal)), theirs)
            for signal, mine, theirs in self.pairs(student, knowledge)
        ]
        return torch.stack(values).mean(dim=0)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare [n, D] with [n, D], row by row, in float32 (or float64): [n]."""


class HiddenMSE(HiddenLoss):
    """Squared difference, the mean over the width.

    Attributes:
        normalise: bring both vectors to length 1 and take the sum over the width instead: the
            squared distance of Sun et al. 2019 (PKD), twice that of hidden_cosine.
    """

    name: Literal["hidden_mse"] = "hidden_mse"
    normalise: bool = False

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.normalise:
            return 2.0 - 2.0 * functional.cosine_similarity(student, teacher, dim=1)
        return (student - teacher).square().mean(dim=1)


class HiddenCosine(HiddenLoss):
    """1 - cosine similarity: the direction counts, the length does not."""

    name: Literal["hidden_cosine"] = "hidden_cosine"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1.0 - functional.cosine_similarity(student, teacher, dim=1)


def _key(signal: str) -> str:
    return signal.replace(".", "_")  # a module's name may hold no dot


def _project(hidden: Tensor, projections: nn.ModuleDict, key: str) -> Tensor:
    """Project where there is a projection; at least float32 either way."""
    if key in projections:
        projection = projections[key]
        hidden = projection(hidden.to(next(projection.parameters()).dtype))
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
