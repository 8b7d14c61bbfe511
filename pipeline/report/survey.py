"""What a cache holds in numbers: how much mass was kept, how unsure the teacher was, how right.

CachedExample, one after the other -> Survey -> percentiles
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.examples import CachedExample
from pipeline.targets import UNLABELLED, SparseDistribution

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Survey:
    """Measurements at temperature 1, one value per target: [N] float64.

    Attributes:
        examples: how many were read.
        kept_mass: probability of the kept classes together.
        entropy_low, entropy_high: bounds of the teacher's entropy in nats, see `entropy_bounds`.
        label_loss: -log p(label) in nats, of the labelled targets only.
    """

    examples: int
    kept_mass: np.ndarray
    entropy_low: np.ndarray
    entropy_high: np.ndarray
    label_loss: np.ndarray


def survey_examples(examples: Iterable[CachedExample]) -> Survey:
    """Measure examples in one pass, holding one at a time."""
    count = 0
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for example in examples:
        count += 1
        distribution = example.targets.at(1.0)
        low, high = entropy_bounds(distribution)
        labelled = example.targets.label_ids != UNLABELLED
        loss = -example.targets.label_log_probs[labelled]
        parts.append((1.0 - distribution.tail_mass, low, high, loss))
    columns = zip(*parts, strict=True) if parts else ([torch.empty(0)] for _ in range(4))
    arrays = [torch.cat(list(column)).double().numpy() for column in columns]
    return Survey(count, *arrays)


def entropy_bounds(distribution: SparseDistribution) -> tuple[Tensor, Tensor]:
    """The least and the most that H(p) can be, in nats, [N] each.

    Exact on the kept classes. The rest of the mass, m, is spread over V - K classes nobody knows:
    most evenly each has m / (V - K); and none is above the least kept probability, so that each
    adds at least p log(1 / p_least).
    """
    log_probs, mass = distribution.log_probs.double(), distribution.tail_mass.double()
    kept = torch.special.entr(log_probs.exp()).sum(dim=-1)
    if log_probs.shape[1] == distribution.num_classes:
        return kept, kept
    present = log_probs > -torch.inf  # the rest is padding of short rows
    others = (distribution.num_classes - present.sum(dim=-1)).double()
    most_even = torch.special.entr(mass) + mass * others.log()
    ceiling = mass.log().nan_to_num(neginf=0.0)
    if log_probs.shape[1]:
        ceiling = torch.minimum(ceiling, log_probs.where(present, 0.0).amin(dim=-1))
    least = torch.where(mass > 0, -mass * ceiling, 0.0)
    return kept + torch.minimum(least, most_even), kept + most_even


def percentiles(values: np.ndarray) -> list[float]:
    """The values at PERCENTILES; nan where there are none."""
    if not len(values):
        return [math.nan] * len(PERCENTILES)
    return [float(value) for value in np.percentile(values, PERCENTILES)]
