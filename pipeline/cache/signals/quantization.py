"""Hidden states in the numbers that a cache keeps: rows become codes, codes become rows again.

    float32 [n, D] -- encode --> codes [n, D], and scales [n, 1] of 8-bit codes -- decode --> [n, D]

bfloat16 and float8 are kept as their bits, because Zarr has neither. An 8-bit code times the scale
of its row is the number; the scale puts the largest magnitude of a row on the largest code.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

VectorType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"]
SCALE = ".scale"  # what the name of a signal's second array ends with

_TINY = torch.finfo(torch.float32).tiny  # scales of rows nearer to 0 would lose their precision
_FLOAT16_STEP = 256.0  # exponents of float8_e4m3fn count from -7, those of float16 from -15


class Encoding(ABC):
    """How the vectors of one dtype are kept.

    Attributes:
        limit: the largest magnitude that can be kept.
        arrays: numpy dtype of each array by the end of its name, the codes' own first.
        largest_scale: with which no code overflows; 0 where there are no scales.
    """

    limit: float
    arrays: dict[str, str]
    largest_scale: float = 0.0

    @abstractmethod
    def encode(self, values: Tensor) -> list[np.ndarray]:
        """What the arrays hold of [n, D] finite values within `limit`."""

    @abstractmethod
    def decode(self, parts: Sequence[np.ndarray], out: Tensor) -> None:
        """Write what `encode` made of [n, D] values into float32 `out`."""


class Cast(Encoding):
    """Every number by itself, rounded to the nearest one of the dtype."""

    def __init__(self, kind: torch.dtype, bits: str) -> None:
        self._kind = kind
        self.limit = torch.finfo(kind).max
        self.arrays = {"": bits}

    def encode(self, values: Tensor) -> list[np.ndarray]:
        cast = values.to(self._kind)
        if self._kind == torch.bfloat16:
            cast = cast.view(torch.uint16)
        return [cast.numpy()]

    def decode(self, parts: Sequence[np.ndarray], out: Tensor) -> None:
        # torch widens float16 twelve times as fast as numpy.
        out.copy_(torch.from_numpy(parts[0]).view(self._kind))


class Scaled(Encoding):
    """8-bit codes with a float32 scale for each row, never 0: |number| <= peak · scale."""

    def __init__(self, peak: float, bits: str) -> None:
        self._peak = peak
        self.limit = torch.finfo(torch.float32).max
        self.arrays = {"": bits, SCALE: "float32"}
        self.largest_scale = self.limit / peak

    def encode(self, values: Tensor) -> list[np.ndarray]:
        values = values.float()
        # Without a copy for |values|: fresh memory costs more than the second pass.
        highest, lowest = values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True)
        largest = torch.maximum(highest, -lowest)
        # One step down, so that no product of a code and its scale exceeds the row's largest.
        scale = torch.nextafter(largest / self._peak, torch.zeros(())).clamp_(min=_TINY)
        codes = (values / scale).clamp_(-self._peak, self._peak)
        return [self._round(codes).numpy(), scale.numpy()]

    def decode(self, parts: Sequence[np.ndarray], out: Tensor) -> None:
        codes, scale = (torch.from_numpy(part) for part in parts)
        self._widen(codes, scale, out)

    @abstractmethod
    def _round(self, codes: Tensor) -> Tensor:
        """To the nearest code."""

    @abstractmethod
    def _widen(self, codes: Tensor, scale: Tensor, out: Tensor) -> None:
        """Codes times their scales."""


class Int8(Scaled):
    """Even steps from -127 to 127: the error is at most half a scale."""

    def __init__(self) -> None:
        super().__init__(127.0, "int8")

    def _round(self, codes: Tensor) -> Tensor:
        return codes.round_().to(torch.int8)

    def _widen(self, codes: Tensor, scale: Tensor, out: Tensor) -> None:
        out.copy_(codes).mul_(scale)


class Float8(Scaled):
    """float8_e4m3fn: the error is at most 1/16 of a number, or 2^-10 of a scale near 0."""

    def __init__(self) -> None:
        super().__init__(448.0, "uint8")

    def _round(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)

    def _widen(self, codes: Tensor, scale: Tensor, out: Tensor) -> None:
        # Moved by 7 bits, sign, exponent and mantissa stand where float16 has them. Ten times as
        # fast as torch's own conversion.
        bits = codes.view(torch.int8).to(torch.int16)
        bits = bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        out.copy_(bits.view(torch.float16)).mul_(scale * _FLOAT16_STEP)


ENCODINGS: dict[VectorType, Encoding] = {
    "float32": Cast(torch.float32, "float32"),
    "float16": Cast(torch.float16, "float16"),
    "bfloat16": Cast(torch.bfloat16, "uint16"),
    "float8_e4m3fn": Float8(),
    "int8": Int8(),
}


@dataclass(frozen=True)
class Block:
    """Rows of a signal as they are kept, decoded where they are asked for."""

    encoding: Encoding
    parts: Sequence[np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in self.parts)

    def decode(self, rows: slice, out: Tensor) -> None:
        """Write some rows into `out`, float32 [rows, D]."""
        self.encoding.decode([part[rows] for part in self.parts], out)
