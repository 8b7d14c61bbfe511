"""The section `hidden` of a cache's config: which hidden states are kept, and how small.

HiddenConfig + the teacher's width -- make_signals --> signals of the cache
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import field_validator

from pipeline.cache import PROJECTIONS, Projection, Signal, VectorType, require_vectors
from pipeline.config import StrictModel, member_of
from pipeline.errors import ConfigError
from pipeline.positions import Positions

POOLED = "pooled"


class HiddenConfig(StrictModel):
    """Which hidden states are kept.

    Attributes:
        layers: 0 for the embeddings, 1 for the first layer, -1 for the last one, after its norm.
        pooled: the mean of the last hidden states over an example's tokens.
        dtype: in the cache; float8_e4m3fn and int8 have a scale for each vector.
        projection: pca (fitted to the first shard) or random, with a width; none keeps the vectors
            as they are. A student compares with the projected vectors.
        positions: of the layers: all (of a language model all that are targets), labelled (those
            with a label), last (of each document), or every: n, one of n.
    """

    layers: tuple[int, ...] = ()
    pooled: bool = False
    dtype: VectorType = "float16"
    projection: Annotated[Projection | None, *member_of(PROJECTIONS, "projection")] = None
    positions: Positions = "all"

    @field_validator("projection", mode="before")
    @classmethod
    def _allow_none(cls, projection: Any) -> Any:
        return None if projection == "none" else projection


def make_signals(config: HiddenConfig, layers: Iterable[str], width: int) -> dict[str, Signal]:
    """The signals of a cache.

    Args:
        layers: the names of the kept layers.
        width: D of the teacher.

    Raises:
        ConfigError: a projection to more numbers than there are.
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
    if config.pooled:
        signals[POOLED] = Signal(**kept, per="example")
    return signals


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
