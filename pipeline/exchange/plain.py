"""What a cache holds of an example as plain columns: ids and log-probabilities, no code.

    CachedExample -- tabulate --> {column: value | [n] | Ragged}

data/README.md describes the columns. Nothing of a record is lost: the logit of an entry is its
log-probability plus the `logsumexp` at T = 1, so every cached temperature can be computed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.cache import Manifest
from pipeline.examples import CachedExample
from pipeline.targets import Targets

HIDDEN = "hidden."
CARRIED = "carried."  # before the name of a carried column that is one of ours
OWN = (
    *("example_id", "input_ids", "segment_lengths", "target_positions", "label_ids"),
    *("label_log_probs", "ids", "log_probs", "kept_mass", "logsumexp"),
    *("draw_ids", "draw_log_probs"),
)


@dataclass(frozen=True)
class Ragged:
    """n lists of numbers, end to end.

    Attributes:
        values: the numbers of all.
        lengths: [n], how many each has.
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, present: np.ndarray | None = None) -> "Ragged":
        """The rows of an [n, w] array, or what is present of them."""
        if present is None:
            present = np.ones(rows.shape, dtype=bool)
        return cls(rows[present], present.sum(axis=1))

    def any(self, marks: np.ndarray) -> np.ndarray:
        """[n] whether any number of a list is marked.

        Args:
            marks: [numbers of all lists].
        """
        lists = np.repeat(np.arange(len(self.lengths)), self.lengths)
        found: np.ndarray = np.bincount(lists[marks], minlength=len(self.lengths)) > 0
        return found

    def select(self, kept: np.ndarray) -> "Ragged":
        """Some of the n lists.

        Args:
            kept: [n] bool.
        """
        return Ragged(self.values[np.repeat(kept, self.lengths)], self.lengths[kept])

    def to_lists(self) -> list[np.ndarray]:
        """The n lists."""
        return np.split(self.values, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def name_carried(column: str) -> str:
    """What a carried column is called beside ours."""
    taken = column in OWN or column.startswith((HIDDEN, CARRIED))
    return CARRIED + column if taken else column


def tabulate(example: CachedExample, manifest: Manifest, hidden: bool = False) -> dict[str, Any]:
    """One row of plain columns.

    Args:
        hidden: its hidden states too, each signal in a column of its own.
    """
    row: dict[str, Any] = {
        "example_id": example.example_id,
        "input_ids": np.asarray(example.input_ids),
        "segment_lengths": np.asarray(example.segment_lengths),
        "target_positions": np.asarray(example.target_positions),
        "label_ids": np.asarray(example.label_ids),
        **_tabulate_targets(example.targets),
    }
    for name in manifest.signals if hidden else ():
        row[HIDDEN + name] = Ragged.of(example.hidden[name].float().numpy())
    return row | {name_carried(name): example.columns[name] for name in manifest.columns}


def _tabulate_targets(targets: Targets) -> dict[str, Any]:
    one = targets.logsumexp[:, targets.temperatures.index(1.0), None]
    ids, log_probs = _by_falling_mass(targets.ids, targets.logits - one)
    draws = _by_falling_mass(targets.draw_ids, targets.draw_logits - one)
    present = log_probs > -np.inf
    row = {
        "label_log_probs": targets.label_log_probs.numpy(),
        "ids": Ragged.of(ids, present),
        "log_probs": Ragged.of(log_probs, present),
        "kept_mass": np.exp(log_probs).sum(axis=1, dtype=np.float64).astype(np.float32),
        "logsumexp": Ragged.of(targets.logsumexp.numpy()),
    }
    if targets.draw_ids.shape[1]:
        row |= {"draw_ids": Ragged.of(draws[0]), "draw_log_probs": Ragged.of(draws[1])}
    return row


def _by_falling_mass(ids: torch.Tensor, log_probs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most probable first, of equals the smaller id."""
    found, said = ids.numpy().astype(np.int32), log_probs.numpy()
    order = np.lexsort((found, -said), axis=1)
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(said, order, axis=1)
