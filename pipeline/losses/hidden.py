"""Learning from hidden states: a projected student layer against a teacher layer, or the pooled
vectors of the two.

    student [M, D] -- projection --> [M, D_teacher] -- compare --> [M], the mean over layer pairs
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Loss, StudentOutputs, Unit


class HiddenLoss(Loss):
    """What the comparisons of hidden states share: which vectors, and how widths are matched.

    Attributes:
        layers: student layer -> teacher layer, 0 the embeddings, negative from the last.
        pooled: compare the pooled vectors instead, one per example.
        projection: "linear", a learned map from the student's width to the teacher's for each
            pair, or "none", for equal widths.
    """

    layers: dict[int, int] = Field(default_factory=dict)
    pooled: bool = False
    projection: Literal["linear", "none"] = "linear"

    @model_validator(mode="after")
    def _check_what_is_compared(self) -> Self:
        if self.pooled == bool(self.layers):
            raise ValueError(
                "expected either layers: {student layer: teacher layer} or pooled: true"
            )
        return self

    @property
    def unit(self) -> Unit:
        return "examples" if self.pooled else "features"

    @property
    def layer_map(self) -> Mapping[int, int]:
        return self.layers

    @property
    def needs_pooled(self) -> bool:
        return self.pooled

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
        keys = ["pooled"] if self.pooled else [_projection_key(layer) for layer in self.layers]
        return nn.ModuleDict({key: nn.Linear(student_width, teacher_width) for key in keys})

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return the mean over the pairs, [M] (or [B] for pooled)."""
        values = [
            self.compare(_project(mine, projections, key), theirs)
            for key, mine, theirs in self._pairs(student, knowledge)
        ]
        return torch.stack(values).mean(dim=0)

    def _pairs(
        self, student: StudentOutputs, knowledge: Knowledge
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.pooled:
            if student.pooled is None:
                raise ConfigError(
                    f"{self.name}: pooled: true, but the student gives no pooled vector;"
                    " compare layers instead"
                )
            yield "pooled", student.pooled, knowledge.hidden["pooled"]
        for mine, theirs in self.layers.items():
            yield _projection_key(mine), student.hidden[mine], knowledge.hidden[f"layer.{theirs}"]

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare [n, D] with [n, D], row by row, in float32 (or float64): [n]."""


class HiddenMSE(HiddenLoss):
    """Squared difference, the mean over the width."""

    name: Literal["hidden_mse"] = "hidden_mse"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean(dim=1)


class HiddenCosine(HiddenLoss):
    """1 - cosine similarity: the direction counts, the length does not."""

    name: Literal["hidden_cosine"] = "hidden_cosine"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1.0 - functional.cosine_similarity(student, teacher, dim=1)


def _projection_key(student_layer: int) -> str:
    return f"layer_{student_layer}"  # a module's name may hold no dot


def _project(hidden: Tensor, projections: nn.ModuleDict, key: str) -> Tensor:
    """Project where there is a projection; at least float32 either way."""
    if key in projections:
        projection = projections[key]
        hidden = projection(hidden.to(next(projection.parameters()).dtype))
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
