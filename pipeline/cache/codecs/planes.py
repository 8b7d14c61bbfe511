"""Integers as byte planes: one column per byte, least significant first.

    ranks, ascending -- differences --> gap_0, gap_1, ...          float32 -- bits --> logit_0 ... 3

zstd packs planes to about three quarters of what it makes of whole integers, because each byte of a
number has statistics of its own.
"""

from collections.abc import Mapping

import numpy as np

from pipeline.cache.codecs.base import Columns, Layout

_PLACE_BITS = 31  # of a place within a row, beside an id of at most 20 bits


def count_planes(largest: int) -> int:
    """Bytes that a number needs."""
    return max(1, (largest.bit_length() + 7) // 8)


def name_planes(prefix: str, planes: int, width: int) -> dict[str, tuple[str, int]]:
    """The columns of [N, width] integers of that many bytes."""
    return {f"{prefix}_{plane}": ("uint8", width) for plane in range(planes)}


def split_planes(values: np.ndarray, prefix: str, planes: int) -> Columns:
    """Integers of at least 0 to columns."""
    return {f"{prefix}_{p}": (values >> (8 * p)).astype(np.uint8) for p in range(planes)}


def join_planes(columns: Mapping[str, np.ndarray], prefix: str, planes: int) -> np.ndarray:
    """Columns to int32."""
    # The highest planes of gaps are mostly all zeros: looking is cheaper than adding.
    while planes > 1 and not columns[f"{prefix}_{planes - 1}"].any():
        planes -= 1
    values = columns[f"{prefix}_{planes - 1}"].astype(np.int32)
    for plane in range(planes - 2, -1, -1):
        values <<= 8
        values += columns[f"{prefix}_{plane}"]
    return values


def sort_ids(
    ids: np.ndarray, values: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order the entries of each row by the rank of their id: ranks, ids and values."""
    ranks = layout.ranking.rank(ids) if layout.ranking else ids
    # Sorting one integer, rank before place, is several times faster than a stable argsort.
    keys = np.sort((ranks << _PLACE_BITS) | np.arange(ids.shape[1]), axis=1)
    order = keys & (2**_PLACE_BITS - 1)
    ordered = [np.take_along_axis(array, order, axis=1) for array in (ids, values)]
    return keys >> _PLACE_BITS, ordered[0], ordered[1]


def split_ranks(ranks: np.ndarray, layout: Layout, prefix: str) -> Columns:
    """Ascending ranks to the planes of their differences, the first from 0."""
    planes = count_planes(layout.num_classes - 1)
    return split_planes(np.diff(ranks, axis=1, prepend=0), prefix, planes)


def join_ids(columns: Mapping[str, np.ndarray], layout: Layout, prefix: str) -> np.ndarray:
    """From the planes of `split_ranks` to ids, int32."""
    ranks = join_planes(columns, prefix, count_planes(layout.num_classes - 1))
    np.cumsum(ranks, axis=1, out=ranks)  # in place, in one type: a cast would cost ten times
    return layout.ranking.find(ranks) if layout.ranking else ranks
