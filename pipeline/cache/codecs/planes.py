"""Integers as byte planes: one column per byte, least significant first.

    ranks, ascending -- differences --> gap_0, gap_1, ...          float32 -- bits --> logit_0 ... 3

zstd packs planes to about three quarters of what it makes of whole integers, because each byte of a
number has statistics of its own.
"""

from collections.abc import Mapping

import numpy as np
import torch

from pipeline.cache.codecs.base import Array, Columns, Find, Layout
from pipeline.cache.codecs.ranking import LARGE
from pipeline.cache.codecs.workspace import take_scratch

_PLACE_BITS = 31  # of a place within a row, beside an id of at most 20 bits
_WIDE = (("<u8", 8), ("<u4", 4), ("<u2", 2), ("u1", 1))
_ONES = 0x0101010101010101


def count_planes(largest: int) -> int:
    """Bytes that a number needs."""
    return max(1, (largest.bit_length() + 7) // 8)


def name_planes(prefix: str, planes: int, width: int) -> dict[str, tuple[str, int]]:
    """The columns of [N, width] integers of that many bytes."""
    return {f"{prefix}_{plane}": ("uint8", width) for plane in range(planes)}


def split_planes(values: np.ndarray, prefix: str, planes: int) -> Columns:
    """Integers of at least 0 to columns."""
    return {f"{prefix}_{p}": (values >> (8 * p)).astype(np.uint8) for p in range(planes)}


def join_planes(columns: Mapping[str, Array], prefix: str, planes: int, out: Array) -> None:
    """Columns to int32."""
    # The highest planes of gaps are mostly all zeros: looking is cheaper than adding, but not
    # where the processor would have to wait for a device's answer.
    if isinstance(out, np.ndarray):
        while planes > 1 and not columns[f"{prefix}_{planes - 1}"].any():
            planes -= 1
    out[...] = columns[f"{prefix}_{planes - 1}"]
    for plane in range(planes - 2, -1, -1):
        out <<= 8
        out += columns[f"{prefix}_{plane}"]


def add_rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[N, W] uint8 plus [N] uint8; no sum may pass 255."""
    # Short rows are added as wide numbers, as a loop for each would cost more than what it adds.
    kind, size = next(pair for pair in _WIDE if values.shape[1] % pair[1] == 0)
    repeated = rows.astype(kind) * np.array(_ONES % 256**size, kind)
    added: np.ndarray = (values.view(kind) + repeated[:, None]).view(np.uint8)
    return added


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


def join_ids(
    columns: Mapping[str, Array], layout: Layout, prefix: str, find: Find, out: Array
) -> None:
    """From the planes of `split_ranks` to ids, int32."""
    gaps = make_like(out, "gaps", out.shape, "int32")
    join_planes(columns, prefix, count_planes(layout.num_classes - 1), gaps)
    if isinstance(gaps, np.ndarray) and gaps.size < LARGE:
        np.cumsum(gaps, axis=1, out=gaps)  # in place, in one type: a cast would cost ten times
    else:
        torch.as_tensor(gaps).cumsum_(1)
    find(gaps, out)


def make_like(out: Array, name: str, shape: tuple[int, ...], kind: str) -> Array:
    """Scratch memory where an array or a tensor is."""
    if isinstance(out, np.ndarray):
        return take_scratch(name, shape, kind)
    return torch.empty(shape, dtype=getattr(torch, kind), device=out.device)
