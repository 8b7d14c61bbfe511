"""The section `hidden` of a cache's config: which hidden states are kept, and how small.

HiddenConfig + the teacher's width -- make_signals --> signals of the cache
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import field_validator, model_validator

from pipeline.attention import HeadShape
from pipeline.cache import PROJECTIONS, Projection, Signal, VectorType, require_vectors
from pipeline.config import StrictModel, member_of
from pipeline.errors import ConfigError
from pipeline.positions import Positions

POOLED = "pooled"


class HiddenConfig(StrictModel):
    """Which hidden states are kept.

    Attributes:
        layers: 0 for the embeddings, 1 for the first layer, -1 for the last one, after its norm.
        qkv: layers whose query, key and value vectors are kept, 1 for the first, -1 for the last:
            what the model's projections give, before rotary positions. `projection` leaves them be.
        head: what the output head of a language model is given at each target, and the head itself:
            all logits can be made from them again. `projection` leaves it be.
        pooled: the mean of the last hidden states over an example's tokens.
        dtype: in the cache; float8_e4m3fn and int8 have a scale for each vector.
        projection: pca (fitted to the first shard) or random, with a width; none keeps the vectors
            as they are. A student compares with the projected vectors.
        positions: of the layers: all (of a language model all that are targets), labelled (those
            with a label), first (the [CLS] of encoders), last (of each document), or every: n, one
            of n.
    """

    layers: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()
    head: bool = False
    pooled: bool = False
    dtype: VectorType = "float16"
    projection: Annotated[Projection | None, *member_of(PROJECTIONS, "projection")] = None
    positions: Positions = "all"

    @field_validator("projection", mode="before")
    @classmethod
    def _allow_none(cls, projection: Any) -> Any:
        return None if projection == "none" else projection

    @model_validator(mode="after")
    def _require_whole_texts(self) -> Self:
        if self.qkv and self.positions != "all":
            raise ValueError(
                "qkv is for relations between all tokens of a text; leave hidden.positions at all"
            )
        return self


def make_signals(
    config: HiddenConfig,
    layers: Iterable[str],
    attention: Mapping[str, HeadShape],
    width: int,
    pooled_width: int | None = None,
    head_width: int | None = None,
) -> dict[str, Signal]:
    """The signals of a cache.

    Args:
        layers: the names of the kept layers.
        attention: those of the kept attention vectors, and what they are made of.
        width: D of the teacher.
        pooled_width: D of its pooled vectors, where nothing is projected; `width` where left out.
        head_width: of what its output head is given; None where it cannot stand alone.

    Raises:
        ConfigError: `head` of a teacher without one, a projection to more numbers than there are.
    """
    kept: dict[str, Any] = {"width": width, "dtype": config.dtype}
    if config.projection is not None:
        if config.projection.width > width:
            raise ConfigError(
                f"hidden.projection.width: {config.projection.width:,} is more than the {width:,}"
                " numbers of the teacher's hidden states; lower it"
            )
        kept |= {"width": config.projection.width, "source_width": width}
        kept["projection"] = config.projection
    signals = {name: Signal(**kept) for name in layers}
    signals |= {
        name: Signal(width=shape.total, dtype=config.dtype, heads=shape.heads)
        for name, shape in attention.items()
    }
    if config.head:
        if head_width is None:
            raise ConfigError(
                "hidden.head: the teacher's logits are no scaled, soft-capped linear map of what"
                " its output head is given; leave it out"
            )
        signals["head"] = Signal(width=head_width, dtype=config.dtype)
    if config.pooled:
        if config.projection is None:
            kept["width"] = pooled_width or width
        signals[POOLED] = Signal(**kept, per="example")
    return signals


def require_targets(config: HiddenConfig, features: str) -> None:
    """Refuse to keep what the head is given elsewhere than at the targets.

    Args:
        features: of the task: the positions whose hidden states are kept.

    Raises:
        ConfigError: `hidden.positions` picks others.
    """
    wanted = "all" if features == "targets" else "labelled"
    if config.head and config.positions != wanted:
        raise ConfigError(
            f"hidden.head: belongs to every target; set hidden.positions to {wanted} for this task"
        )


def require_rows(signals: dict[str, Signal], lengths: Sequence[int]) -> None:
    """Refuse a PCA for which the first shard has too few vectors at any rate.

    The writer counts them exactly, once the teacher has been asked.

    Args:
        lengths: tokens of the first shard's examples.

    Raises:
        DataError: fewer than principal components.
    """
    for name, signal in signals.items():
        if signal.projection is not None:
            rows = len(lengths) if signal.per == "example" else sum(lengths)
            require_vectors(signal.projection, name, rows)
