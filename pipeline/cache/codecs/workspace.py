"""Memory that is used again: fresh pages cost a processor more than what is written to them.

take_scratch  what a decoder needs for a moment, by name and thread
take_arrays   what it returns: parts of a block, which is used again once nobody refers to it
"""

import sys
import threading
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

_BLOCKS = 8  # that are kept at most
_LEAST = 2**18  # bytes; the allocator of the system keeps smaller ones itself
_ALIGNED = 64


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], np.ndarray] = {}


_scratch = _Scratch()
_blocks: list[np.ndarray] = []
_lock = threading.Lock()


def take_scratch(name: str, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Uninitialised memory, which the next call with this name and type gives out again."""
    key, count = (name, np.dtype(dtype).str), prod(shape)
    kept = _scratch.kept.get(key)
    if kept is None or len(kept) < count:
        kept = _scratch.kept[key] = np.empty(count, dtype)
    return kept[:count].reshape(shape)


def take_arrays(shapes: Sequence[tuple[int, ...]], kinds: Sequence[str]) -> list[np.ndarray]:
    """Uninitialised arrays of 4-byte types, of a block that nobody else refers to."""
    sizes = [-(-prod(shape) * 4 // _ALIGNED) * _ALIGNED for shape in shapes]
    block, start = _take_block(sum(sizes)), 0
    arrays = []
    for size, shape, kind in zip(sizes, shapes, kinds, strict=True):
        arrays.append(block[start : start + prod(shape) * 4].view(kind).reshape(shape))
        start += size
    return arrays


def _take_block(size: int) -> np.ndarray:
    """A view of a block, alive as long as any array or tensor of it is."""
    if size < _LEAST:
        return np.empty(size, dtype=np.uint8)
    with _lock:
        for index in range(len(_blocks)):
            # Two: the list, and the argument of the question itself.
            if sys.getrefcount(_blocks[index]) == 2 and size <= _blocks[index].nbytes <= 2 * size:
                return _blocks[index][:size]
        block = np.empty(size + size // 8, dtype=np.uint8)  # the next may be a little larger
        _blocks.append(block)
        if len(_blocks) > _BLOCKS:
            del _blocks[0]
        return block[:size]
