"""What a cache says of each hidden state that it keeps, and which arrays that takes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.cache.signals.chunks import Kind
from pipeline.cache.signals.projection import PROJECTIONS, Projection
from pipeline.cache.signals.quantization import ENCODINGS, VectorType
from pipeline.config import StrictModel, member_of

MAX_WIDTH = 2**18  # of a vector; a chunk of 512 rows then takes half a gibibyte


def optional(default: Any = None) -> Any:
    """A field that came later: not written where it has its default, so that old caches keep their
    digest."""
    return Field(default=default, exclude_if=lambda found: found == default)


class Signal(StrictModel):
    """A kept vector: [M, width] for each example where `per` is feature, else [1, width].

    Attributes:
        projection: of the teacher's vectors, which are `source_width` wide; None where they are
            kept as they are.
        heads: of attention vectors: how many heads stand after one another in each.
    """

    width: int = Field(gt=0, le=MAX_WIDTH)
    dtype: VectorType = "float16"
    per: Literal["feature", "example"] = "feature"
    projection: Annotated[Projection | None, *member_of(PROJECTIONS, "projection")] = optional()
    source_width: Annotated[int, Field(gt=0, le=MAX_WIDTH)] | None = optional()
    heads: Annotated[int, Field(gt=0, le=MAX_WIDTH)] | None = optional()

    @model_validator(mode="after")
    def _require_fitting(self) -> Self:
        if self.projection is not None and self.projection.width != self.width:
            raise ValueError(f"is {self.width} wide, its projection {self.projection.width}")
        if self.heads is not None and self.width % self.heads:
            raise ValueError(f"is {self.width} wide, which {self.heads} heads cannot share")
        return self

    @property
    def given_width(self) -> int:
        """D of the teacher's vectors."""
        return self.source_width or self.width


def list_arrays(signals: Mapping[str, Signal]) -> dict[str, Kind]:
    """The arrays of all signals by name."""
    return {
        name + end: Kind(dtype, signal.width if end == "" else 1)
        for name, signal in signals.items()
        for end, dtype in ENCODINGS[signal.dtype].arrays.items()
    }
