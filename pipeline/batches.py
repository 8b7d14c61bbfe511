"""From examples to what one training step needs: padded inputs, and knowledge at their positions.

[i] -> Example or CachedExample -> Collator -> {"inputs", "target_index", ..., "targets", ...}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pipeline.cache.order import epoch_order
from pipeline.examples import CachedExample, Example
from pipeline.targets import UNLABELLED, Targets
from pipeline.tasks.base import Task

UNITS = ("targets", "labels", "features", "examples")


class ExampleSource(Protocol):
    """Anything with a length that gives an example by number: a cache, a list, a joined cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Selection(Dataset[Example]):
    """Some rows of a source, by index, as a torch data set."""

    def __init__(self, source: ExampleSource, indices: Sequence[int] | np.ndarray | None = None):
        self.source = source
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


class EpochSampler(Sampler[int]):
    """The order of an epoch: a pure function of (rows, seed, epoch), local enough for the disk."""

    def __init__(self, rows: int, seed: int, block: int = 64):
        self.rows = rows
        self.seed = seed
        self.block = block
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self):  # type: ignore[no-untyped-def]
        order = epoch_order(self.rows, block=self.block, seed=self.seed, epoch=self.epoch)
        return iter(order.tolist())


@dataclass(frozen=True)
class Collator:
    """Join examples into one batch of tensors, by name.

    The result holds `inputs` (what the model is called with), `target_index` [N], `feature_index`
    [M], `label_ids` [N], `counts` [4] (valid units in the order of UNITS), `targets` (where the
    examples come from a cache) and `hidden` (signal -> [M, D]).

    Attributes:
        task: pads and locates.
        pad_id: the token that fills short rows.
        signals: the name a loss uses ("layer.-1") -> the cached signal to load ("layer.4"); all
            others are left in the cache.
    """

    task: Task
    pad_id: int
    signals: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = self.task.batch(examples, self.pad_id)
        labels = np.concatenate([example.label_ids for example in examples])
        label_ids = torch.from_numpy(labels.astype(np.int64))
        cached = [example for example in examples if isinstance(example, CachedExample)]
        joined: dict[str, Any] = {
            "inputs": dict(batch.inputs),
            "target_index": batch.target_index,
            "feature_index": batch.feature_index,
            "label_ids": label_ids,
            "counts": torch.tensor(
                [
                    len(batch.target_index),
                    int((label_ids != UNLABELLED).sum()),
                    len(batch.feature_index),
                    len(examples),
                ],
                dtype=torch.float64,
            ),
        }
        if cached:
            joined["targets"] = Targets.cat([example.targets for example in cached])
            joined["hidden"] = _stack_hidden(cached, self.signals)
        return joined


def _stack_hidden(
    examples: Sequence[CachedExample], signals: Mapping[str, str]
) -> dict[str, Tensor]:
    return {
        name: torch.cat([example.hidden[signal] for example in examples])
        for name, signal in signals.items()
    }
