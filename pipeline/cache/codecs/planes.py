"""Integers as byte planes: one column per byte, least significant first.

    ids, ascending -- differences --> gap_0, gap_1, ...          float32 -- bits --> logit_0 ... 3

zstd packs planes to about three quarters of what it makes of whole integers, because each byte of a
number has statistics of its own.
"""

from collections.abc import Mapping

import numpy as np

from pipeline.cache.codecs.base import Columns

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


def sort_by_id(ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order the entries of each row by id, equal ids by place."""
    # Sorting one integer, id before place, is several times faster than a stable argsort.
    keys = np.sort((ids << _PLACE_BITS) | np.arange(ids.shape[1]), axis=1)
    order = keys & (2**_PLACE_BITS - 1)
    return keys >> _PLACE_BITS, np.take_along_axis(values, order, axis=1)


def split_ids(ids: np.ndarray, num_classes: int, prefix: str) -> Columns:
    """Ascending ids to the planes of their differences, the first from 0."""
    return split_planes(np.diff(ids, axis=1, prepend=0), prefix, count_planes(num_classes - 1))


def join_ids(columns: Mapping[str, np.ndarray], num_classes: int, prefix: str) -> np.ndarray:
    """The inverse of `split_ids`, int32."""
    ids = join_planes(columns, prefix, count_planes(num_classes - 1))
    np.cumsum(ids, axis=1, out=ids)  # in place and in the same type: a cast would cost ten times
    return ids
