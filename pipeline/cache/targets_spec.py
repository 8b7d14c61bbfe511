"""What is kept of the teacher's distribution: how much of it, how exact, and how it is written."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.cache.codecs import CODECS, MAX_CLASSES, Codec, Steps
from pipeline.cache.signals.spec import optional
from pipeline.config import StrictModel, member_of
from pipeline.errors import ConfigError


class TargetsSpec(StrictModel):
    """What is kept of the teacher's distribution at each target.

    Attributes:
        top_k: K, the classes with the highest logits; "all" keeps every class.
        tail_draws: R, ids drawn with replacement from the distribution without the kept classes.
        temperatures: those at which targets shall be exact; 1 is always one of them.
        codec: how entries are written.
        compression: of what is written, input tokens and all. lz4 takes a third more bytes than
            zstd and a fraction of the time to read; none takes three times as many.
    """

    top_k: Annotated[int, Field(ge=0)] | Literal["all"] = 64
    tail_draws: int = Field(default=0, ge=0)
    temperatures: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (1.0,)
    codec: Annotated[Codec, *member_of(CODECS, "codec")] = Steps()
    compression: Literal["zstd", "lz4", "none"] = optional("zstd")

    @field_validator("temperatures")
    @classmethod
    def _sort_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({1.0, *temperatures}))

    @model_validator(mode="after")
    def _require_entries(self) -> Self:
        if self.top_k == 0 and self.tail_draws == 0:
            raise ValueError("keeps nothing; set top_k or tail_draws above 0")
        return self

    def resolve(self, num_classes: int) -> "TargetsSpec":
        """Return the same with `top_k` as a number.

        Raises:
            ConfigError: K above V, draws where nothing is cut off, or too many classes.
        """
        top_k = num_classes if self.top_k == "all" else self.top_k
        if not 0 < num_classes <= MAX_CLASSES:
            raise ConfigError(
                f"targets: {num_classes:,} classes; a cache holds between 1 and {MAX_CLASSES:,}"
            )
        if top_k > num_classes:
            raise ConfigError(
                f"targets.top_k: {top_k:,} is more than the {num_classes:,} classes of the teacher;"
                " lower it, or set it to all"
            )
        if top_k == num_classes and self.tail_draws:
            raise ConfigError(
                f"targets.tail_draws: {self.tail_draws} draws, but top_k keeps all {num_classes:,}"
                " classes and leaves no tail; set tail_draws to 0 or lower top_k"
            )
        return self.model_copy(update={"top_k": top_k})
