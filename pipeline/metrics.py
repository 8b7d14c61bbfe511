"""Measurements with a unit, a direction and the slice of data they were taken on."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Direction = Literal["lower", "higher", "none"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)


@dataclass(frozen=True)
class Metric:
    """One number: `value` in `unit`, better when `direction` says, measured on `slice`.

    `slice` is "all" or "column=value", for instance "language=yor_Latn".
    """

    name: str
    value: float
    unit: str
    direction: Direction
    slice: str = "all"

    @property
    def key(self) -> str:
        """Its name in a curve: `loss` of the whole, `loss/language=yor_Latn` of a slice."""
        return self.name if self.slice == "all" else f"{self.name}/{self.slice}"


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> float:
    """Mean |accuracy - confidence| over equal-width confidence bins, weighted by their counts.

    Args:
        confidence: [N] in [0, 1], the probability given to the predicted class.
        correct: [N] bool, whether the prediction is the label.
        bins: number of bins; 15 is the usual choice.

    Returns:
        The error in percent, 0 for no predictions. Naeini et al. 2015; Guo et al. 2017.
    """
    if len(confidence) == 0:
        return 0.0
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(which, weights=confidence - correct.astype(np.float64), minlength=bins)
    return float(100.0 * np.abs(gap).sum() / len(confidence))


def precision_recall_f1(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per-class precision, recall, F1 and support, 0 where undefined.

    Args:
        labels: [N] int, predictions: [N] int, both in [0, num_classes).

    Returns:
        Four [num_classes] float arrays. Their mean over the classes with support is the macro
        average.
    """
    hits = np.bincount(labels[labels == predictions], minlength=num_classes).astype(np.float64)
    support = np.bincount(labels, minlength=num_classes).astype(np.float64)
    predicted = np.bincount(predictions, minlength=num_classes).astype(np.float64)
    precision = hits / np.maximum(predicted, 1.0)
    recall = hits / np.maximum(support, 1.0)
    f1 = 2.0 * hits / np.maximum(predicted + support, 1.0)
    return precision, recall, f1, support


def pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of [N] and [N]; 0 where one of them is constant."""
    centred = [values - values.mean() for values in (one.astype(float), other.astype(float))]
    scale = float(np.sqrt(np.prod([np.square(values).sum() for values in centred])))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else 0.0


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of [N] and [N]: Pearson's of their ranks, the mean rank for
    ties."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: np.ndarray) -> np.ndarray:
    """[N] ranks from 0; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    ranks: np.ndarray = (last - (counts - 1) / 2)[places]
    return ranks
