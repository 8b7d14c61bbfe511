"""Which positions of an example have their hidden states kept.

feature positions of the task, [M] -- pick --> those that are kept, for teacher and student alike
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from pipeline.config import StrictModel, parse_config
from pipeline.examples import Example
from pipeline.targets import UNLABELLED

_NAMES = ("all", "labelled", "first", "last")


class Every(StrictModel):
    """One position of every `every`: the middle one of each full run, if runs are counted from the
    first position of the example."""

    every: int = Field(ge=2)


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):  # in a union pydantic would complain about the names first
        return parse_config(Every, value, "positions")
    if isinstance(value, Every) or value in _NAMES:
        return value
    raise ValueError(f"expected {', '.join(_NAMES)}, or every: a number")


# "all" of the task's; "labelled", those with a target that has a label; "first" of the example,
# where encoders have their [CLS]; "last" of each document.
Positions = Annotated[Literal["all", "labelled", "first", "last"] | Every, BeforeValidator(_read)]


def pick_positions(features: np.ndarray, example: Example, positions: Positions) -> np.ndarray:
    """The feature positions of an example that are kept.

    Args:
        features: [M] ascending, all that the task has.

    Returns:
        [M'] of these, ascending; maybe none.
    """
    if positions == "labelled":
        labelled = example.target_positions[example.label_ids != UNLABELLED]
        return features[np.isin(features, labelled)]
    if positions == "first":
        return features[:1]
    if positions == "last":
        document = np.searchsorted(np.cumsum(example.segment_lengths), features, side="right")
        return features[np.flatnonzero(np.diff(document, append=-1))]
    if isinstance(positions, Every):
        return features[positions.every // 2 :: positions.every]
    return features
