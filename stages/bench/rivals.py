"""Records that others keep of a sparse target, written by us from what they publish.

    log-probabilities [N, K], highest first --> bytes per target, log-probabilities as decoded

Only sizes and errors are taken from them; no speed, which would be that of our code.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Record = tuple[float, np.ndarray]


@dataclass(frozen=True)
class Polynomial:
    """Like DistillKit: ids bit-packed by rank, the first log-probabilities exact as bfloat16, the
    others as a polynomial of the rank.

    Attributes:
        exact: log-probabilities kept as bfloat16.
        terms: coefficients of the polynomial, float32.
    """

    exact: int
    terms: int

    def __call__(self, ids: np.ndarray, log_probs: np.ndarray, num_classes: int) -> Record:
        """Fit by least squares."""
        width = log_probs.shape[1]
        found = _round_to_bfloat16(log_probs)
        rest = log_probs[:, self.exact :]
        if rest.shape[1]:
            powers = np.vander(np.linspace(-1, 1, rest.shape[1]), self.terms)
            terms = (rest @ np.linalg.pinv(powers).T).astype(np.float32)
            found[:, self.exact :] = terms @ powers.T
        size = _pack_ids(ids, num_classes) + 2 * min(self.exact, width) + 4 * self.terms
        return size, found


def keep_naively(ids: np.ndarray, log_probs: np.ndarray, num_classes: int) -> Record:
    """int32 and float16."""
    return 6.0 * ids.shape[1], log_probs.astype(np.float16).astype(np.float64)


def keep_halves(ids: np.ndarray, log_probs: np.ndarray, num_classes: int) -> Record:
    """Like Megatron-LM: ids bit-packed by rank, float16 log-probabilities, compressed."""
    values = log_probs.astype(np.float16)
    packed = len(zlib.compress(values.tobytes(), 6)) / len(values)
    return _pack_ids(ids, num_classes) + packed, values.astype(np.float64)


RIVALS: dict[str, Callable[[np.ndarray, np.ndarray, int], Record]] = {
    "int32 + float16": keep_naively,
    "like Megatron-LM": keep_halves,
    "like DistillKit, 16 exact": Polynomial(exact=16, terms=6),
    "like DistillKit, 1 exact": Polynomial(exact=1, terms=3),
}


def _pack_ids(ids: np.ndarray, num_classes: int) -> float:
    """Bytes of ids in rank order at the bits of the vocabulary; they do not compress."""
    return int(ids.shape[1]) * (num_classes - 1).bit_length() / 8


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = torch.from_numpy(values).to(torch.bfloat16).double().numpy()
    return rounded
