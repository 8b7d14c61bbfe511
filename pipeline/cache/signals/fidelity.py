"""How near the kept hidden states are to the teacher's: a report on vectors of the first shard.

vectors, and what is read back of them -- Sample.add --> at most 4,096 pairs -- measure --> report
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.cache.signals.projection import Basis
from pipeline.cache.signals.spec import optional
from pipeline.config import StrictModel

_ROWS = 4096
_ELEMENTS = 1 << 22  # of the vectors that are compared; wide ones are fewer, CKA costs n²D
_DIGITS = 6


class Fidelity(StrictModel):
    """What became of a signal's vectors x, read back as y.

    Where they were projected, cosine and error are those of the reconstruction, CKA that of y.

    Attributes:
        rows: vectors that were compared, evenly spaced over the first shard.
        cosine, cosine_p1: similarity of x and y: the mean, and the 1st percentile.
        relative_mse: sum of |x - y|^2 over the sum of |x|^2.
        cka: linear CKA, from 0 to 1; None where the vectors do not vary.
        explained_variance: the share of the first shard's variance that a PCA keeps.
    """

    rows: int
    cosine: float
    cosine_p1: float
    relative_mse: float
    cka: float | None
    explained_variance: float | None = optional()


class Sample:
    """Evenly spaced rows of a stream whose end is not known: every 2^n-th, as few as fit."""

    def __init__(self, width: int) -> None:
        self._limit = max(2, min(_ROWS, _ELEMENTS // width))
        self._step = 1
        self._seen = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def pick(self, count: int) -> slice:
        """Which of the next `count` rows are wanted."""
        first = -self._seen % self._step
        self._seen += count
        return slice(first, count, self._step)

    def add(self, given: Tensor, read: Tensor) -> None:
        """Take what was picked, [n, D], and what is read back of it, [n, d]."""
        self._pairs.append((given.clone(), read.clone()))  # a view would keep all rows alive
        while sum(len(given) for given, _ in self._pairs) > self._limit:
            given, read = self._join()
            self._pairs = [(given[::2].clone(), read[::2].clone())]
            self._step *= 2

    def measure(self, basis: Basis | None) -> Fidelity | None:
        """The report; None where there were no rows."""
        if not self._pairs:
            return None
        return measure(*self._join(), basis)

    def _join(self) -> tuple[Tensor, Tensor]:
        given, read = zip(*self._pairs, strict=True)
        return torch.cat(given), torch.cat(read)


def measure(given: Tensor, read: Tensor, basis: Basis | None) -> Fidelity:
    """Compare n vectors [n, D] with what is read back of them, [n, d], in float64."""
    x, kept = given.double(), read.double()
    y = kept if basis is None else basis.reconstruct(read).double()
    error, norm = (x - y).square().sum(), x.square().sum()
    cosines = functional.cosine_similarity(x, y, dim=1, eps=1e-300)
    cosines[(x == y).all(dim=1)] = 1.0  # zeros have no direction to lose
    explained: dict[str, Any] = {}
    if basis is not None and len(basis.explained_variance):
        explained["explained_variance"] = _shorten(basis.explained_variance.sum())
    return Fidelity(
        rows=len(x),
        cosine=_shorten(cosines.mean()),
        cosine_p1=_shorten(cosines.quantile(0.01)),
        relative_mse=_shorten(error / norm) if norm else 0.0,
        cka=linear_cka(x, kept),
        **explained,
    )


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Centred kernel alignment of [n, D] and [n, d] with linear kernels, float64.

    |X'Y|^2 / (|X'X| |Y'Y|) in Frobenius norms; through [n, n] where that is smaller.
    """
    x, y = (side - side.mean(dim=0) for side in (x, y))
    if len(x) < x.shape[1]:
        across, own = x @ x.T, y @ y.T
        shared = (across * own).sum()
    else:
        across, own = x.T @ x, y.T @ y
        shared = (x.T @ y).square().sum()
    scale = across.norm() * own.norm()
    return _shorten(shared / scale) if scale else None


def _shorten(value: Tensor) -> float:
    """Few digits: the last ones depend on how many threads summed up."""
    return float(f"{float(value):.{_DIGITS}g}")
