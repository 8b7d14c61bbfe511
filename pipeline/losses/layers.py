"""Which hidden states of student and teacher are compared: pairs of layers, or the pooled vectors.

layers: uniform | last | {student: teacher} -- resolve, with both depths --> {student: teacher}
"""

from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Loss, StudentOutputs, Unit


def _spread(layer: int, student: int, teacher: int) -> int:
    return -(-layer * teacher // student)


def _align_ends(layer: int, student: int, teacher: int) -> int:
    return layer + teacher - student


# Of layer m of the student's M and the teacher's N: "uniform" ceil(m N / M), so that the last
# meets the last (Jiao et al. 2020, TinyBERT; PKD-skip of Sun et al. 2019); "last" N - M + m, the
# top M layers of the teacher (PKD-last of Sun et al. 2019).
MAPS: dict[str, Callable[[int, int, int], int]] = {"uniform": _spread, "last": _align_ends}


class MappedLoss(Loss, ABC):
    """What the losses of layers share: which are compared.

    Attributes:
        layers: student layer -> teacher layer, 0 the embeddings, negative from the last; or
            "uniform" or "last", for every layer of the student but the embeddings.
    """

    layers: dict[int, int] | Literal["uniform", "last"] = Field(default_factory=dict)

    @field_validator("layers", mode="before")
    @classmethod
    def _require_known_map(cls, layers: Any) -> Any:
        if isinstance(layers, Mapping) or layers in MAPS:
            return layers
        raise ValueError(f"expected {', '.join(MAPS)}, or {{student layer: teacher layer}}")

    def resolve(self, student_layers: int, teacher_layers: int) -> Self:
        """See `Loss.resolve`."""
        if not isinstance(self.layers, str):
            return self
        if student_layers < 1:
            raise ConfigError(
                f"losses: {self.name}: layers: {self.layers}, but the student has no layers that"
                " can be counted; name them: {student layer: teacher layer}"
            )
        if self.layers == "last" and student_layers > teacher_layers:
            raise ConfigError(
                f"losses: {self.name}: layers: last, but the student has {student_layers} layers"
                f" and the teacher {teacher_layers}; use layers: uniform"
            )
        pick = MAPS[self.layers]
        layers = range(1, student_layers + 1)
        found = {layer: pick(layer, student_layers, teacher_layers) for layer in layers}
        return self.model_copy(update={"layers": found})

    @property
    def layer_map(self) -> Mapping[int, int]:
        """Student layer -> teacher layer, once they are known by number."""
        assert not isinstance(self.layers, str), "resolve() comes first"
        return self.layers


class LayerLoss(MappedLoss, ABC):
    """What the losses of hidden states share: layers, or the pooled vectors.

    Attributes:
        pooled: compare the pooled vectors instead of layers, one per example.
    """

    pooled: bool = False

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
    def compares(self) -> Mapping[str, str]:
        if self.pooled:
            return {"pooled": "pooled"}
        return {f"layer.{mine}": f"layer.{theirs}" for mine, theirs in self.layer_map.items()}

    def pairs(
        self, student: StudentOutputs, knowledge: Knowledge
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The student's signal of each pair, its vectors [n, D], and the teacher's [n, D']."""
        for mine, theirs in self.compares.items():
            yield mine, student.hidden[mine], knowledge.hidden[theirs]
