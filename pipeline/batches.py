"""From examples to what one training step needs: padded inputs, and knowledge at their positions.

[i] -> Example or CachedExample -> Collator -> {"inputs", "target_index", ..., "targets", ...}
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pipeline.accounts import Marks
from pipeline.cache.ahead import AHEAD_ROWS
from pipeline.cache.index.splits import RowRuns, hash_id
from pipeline.cache.order import EpochOrder
from pipeline.cache.reader import STREAM_BLOCK, TeacherCache
from pipeline.cache.record_batch import join_targets
from pipeline.errors import ConfigError
from pipeline.examples import CachedExample, Example
from pipeline.positions import Positions
from pipeline.sampling import Deal
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Task

COUNTED = ("targets", "labels", "features", "examples", "tokens")


class ExampleSource(Protocol):
    """Anything with a length that gives an example by number: a cache, a list, a joined cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Selection(Dataset[Example]):
    """Some rows of a source, by index, as a torch data set.

    Attributes:
        source: of the examples.
        indices: the rows.
        deal: which of them an epoch of training visits, and how often; None for each once.
    """

    deal: Deal | None = None

    def __init__(self, source: ExampleSource, indices: Sequence[int] | np.ndarray | None = None):
        self.source = source
        if indices is None:
            indices = RowRuns(np.array([0]), np.array([len(source)]))
            if isinstance(source, TeacherCache):
                indices = source.answered
        kept = indices if isinstance(indices, RowRuns) else np.asarray(indices)
        self.indices: RowRuns | np.ndarray = kept

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        """A batch, as a DataLoader asks for it."""
        if self.is_remote:
            self.read_ahead(np.asarray(indices))
        return [self[index] for index in indices]

    @property
    def is_remote(self) -> bool:
        """Whether examples are read from a cache in a store."""
        return isinstance(self.source, TeacherCache) and self.source.is_remote

    def read_ahead(self, indices: np.ndarray) -> None:
        """Begin to fetch what coming examples need; see `TeacherCache.read_ahead`."""
        if isinstance(self.source, TeacherCache):
            self.source.read_ahead(np.asarray(self.indices[indices]))


class Order(Protocol):
    """The rows of an epoch, read by slices."""

    def __getitem__(self, places: slice, /) -> np.ndarray: ...


Ahead = Callable[[np.ndarray], None]


class StepRows(Sequence[int]):
    """The rows of one rank's step, computed when they are asked for: skipped ones never are.

    A plain class, because a run that continues late makes millions of them only to skip them.
    """

    __slots__ = ("_ahead", "_order", "_start", "_step", "_stop")

    def __init__(
        self, order: Order, start: int, stop: int, step: int, ahead: Ahead | None = None
    ) -> None:
        self._order, self._start, self._stop, self._step = order, start, stop, step
        self._ahead = ahead

    def __len__(self) -> int:
        return len(range(self._start, self._stop, self._step))

    def __iter__(self) -> Iterator[int]:
        if self._ahead is not None:
            end = self._start + max(AHEAD_ROWS * self._step, self._stop - self._start)
            self._ahead(self._order[self._start : end : self._step])
        return iter(self._order[self._start : self._stop : self._step].tolist())

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a worker is sent rows, not the order


class StepSampler(Sampler[list[int]]):
    """One rank's share of every batch of an epoch.

    The order is a pure function of (visits, seed, epoch), local enough for the disk. It is cut into
    batches of `batch_size` times `world_size`, and rank r takes every `world_size`-th row of each
    from r on: together the ranks see every visit once. Rows that are left and too few to give each
    rank one join the last batch, so that all ranks take the same number of steps. Whoever continues
    an epoch steps over what was taken: that neither computes rows nor reads any.

    Args:
        visits: how many rows there are, each of which an epoch visits once, or what it deals.
        first_epoch: whose order comes first; a later stage goes on where the one before ended.
        ahead: told the places of a step, and of those that follow it, when the step is taken.

    Raises:
        ConfigError: there are fewer rows than ranks.
    """

    def __init__(
        self,
        visits: int | Deal,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        first_epoch: int = 0,
        ahead: Ahead | None = None,
    ):
        rows = visits if isinstance(visits, int) else len(visits)
        if rows < world_size:
            raise ConfigError(
                f"training: {rows} examples cannot be shared by {world_size} processes; use fewer"
            )
        self.visits = visits
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = self.first_epoch = first_epoch
        self._ahead = ahead
        self._size = batch_size * world_size
        whole, left = divmod(rows, self._size)
        drop = drop_last and whole > 0
        self._steps = whole + (whole == 0 or (left >= world_size and not drop))
        self._end = whole * self._size if drop else rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from the first, whose order the next iteration follows."""
        self.epoch = self.first_epoch + epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        order: Order
        if isinstance(self.visits, int):
            order = EpochOrder(self.visits, STREAM_BLOCK, self.seed, self.epoch)
        else:
            order = self.visits.order(self.seed, self.epoch)
        size, rank, ranks, last = self._size, self.rank, self.world_size, self._steps - 1
        for start in range(0, last * size, size):
            yield StepRows(order, start + rank, start + size, ranks, self._ahead)  # type: ignore[misc]
        yield StepRows(order, last * size + rank, self._end, ranks, self._ahead)  # type: ignore[misc]


class FurtherKnowledge(Protocol):
    """What other teachers said of the same examples."""

    def ask(self, examples: Sequence[Example], first: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Collator:
    """Join examples into one batch of tensors, by name.

    The result holds `inputs` (what the model is called with), `target_index` [N], `feature_index`
    [M], `label_ids` [N], `token_mask` [B, T] (False where padded), `counts` [5] (in the order of
    COUNTED), `targets` (where the examples come from a cache), `hidden` (signal -> [M, D]) and what
    belongs to it: `documents` [M] (see `Task.number_documents`; only where a signal has a row per
    position), `example_keys` [B] (a number for each id; only where there are pooled vectors). Of a
    regression it holds `numbers` [N, V] too.

    Attributes:
        task: pads and locates.
        pad_id: the token that fills short rows.
        signals: the name a loss uses ("layer.-1") -> the cached signal to load ("layer.4"); all
            others are left in the cache.
        heads: name of a signal -> attention heads in each of its vectors; the rows of such a signal
            are [M, heads, D / heads].
        positions: whose hidden states are cached.
        company: further teachers, which add `teachers` and `shares` to a batch; see `teachers`.
        marks: weights of the examples, and slices that are logged; see `Marks.mark`.
        decode_late: leave `targets` in codes, a third of the bytes, to be decoded by their `to` on
            the device that they are moved to. A DataLoader's worker decodes all the same.
    """

    task: Task
    pad_id: int
    signals: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    positions: Positions = "all"
    company: "FurtherKnowledge | None" = None
    marks: Marks | None = None
    decode_late: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        return self.read_targets(examples) | self.read_features(examples)

    def read_targets(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch without hidden states."""
        batch = self.task.batch(examples, self.pad_id, self.positions)
        labels = np.concatenate([example.label_ids for example in examples])
        label_ids = torch.from_numpy(labels.astype(np.int64))
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        cached = [example for example in examples if isinstance(example, CachedExample)]
        joined: dict[str, Any] = {
            "inputs": dict(batch.inputs),
            "target_index": batch.target_index,
            "feature_index": batch.feature_index,
            "label_ids": label_ids,
            "token_mask": torch.arange(int(lengths.max())) < lengths[:, None],
            "counts": torch.tensor(
                [
                    len(batch.target_index),
                    int((label_ids != UNLABELLED).sum()),
                    len(batch.feature_index),
                    len(examples),
                    int(lengths.sum()),
                ]
            ),
        }
        if (numbers := self.task.numbers(examples)) is not None:
            joined["numbers"] = numbers
        if cached:
            late = self.decode_late and torch.utils.data.get_worker_info() is None
            joined["targets"] = join_targets(cached, late)
        if self.company is not None:
            joined |= self.company.ask(examples, joined.get("targets"))
        if self.marks is None:
            return joined
        features = self.task.count_features(examples, self.positions)
        return self.marks.mark(joined, examples, features)

    def read_features(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`hidden` and what belongs to it; nothing of examples without a teacher."""
        cached = [example for example in examples if isinstance(example, CachedExample)]
        if not cached:
            return {}
        found: dict[str, Any] = {"hidden": self._stack_hidden(cached)}
        if "pooled" in self.signals:
            keys = np.array([hash_id(example.example_id) for example in examples], dtype=np.uint64)
            found["example_keys"] = torch.from_numpy(keys.view(np.int64))
        if set(self.signals) - {"pooled"}:
            found["documents"] = self.task.number_documents(examples, self.positions)
        return found

    def _stack_hidden(self, examples: Sequence[CachedExample]) -> dict[str, Tensor]:
        stacked = {}
        for name, signal in self.signals.items():
            rows = torch.cat([example.hidden[signal] for example in examples])
            heads = self.heads.get(name)
            stacked[name] = rows if heads is None else torch.stack(rows.chunk(heads, dim=1), dim=1)
        return stacked
