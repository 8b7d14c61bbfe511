"""A record batch of rows.arrow as tensors: decoded once, as a whole, and given out in views.

    RecordBatch -- Batch.decode --> tensors of all its targets -- example(i) --> CachedExample

What a codec costs per call is shared by some tens of examples, and joining neighbours of a batch
again is one copy.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.cache.codecs import Ranking
from pipeline.cache.manifest import Draft
from pipeline.cache.rows import FEATURES, TARGETS, TOKENS
from pipeline.examples import CachedExample, Column
from pipeline.targets import UNLABELLED, Targets

_ENTRY_BYTES = 8  # of an entry once decoded: int32 id, float32 logit
_TOKEN_BYTES = 24  # about, of a token and of what a target has once


class Batch:
    """A record batch; every example is a view of it and is not to be written to.

    Attributes:
        nbytes: what it occupies once it is decoded, about.
        visits: how often examples of it were given out.
    """

    def __init__(
        self, batch: Any, draft: Draft, kinds: Mapping[str, tuple[str, int]], ranking: Ranking
    ) -> None:
        """Decode nothing yet.

        Args:
            kinds: `target_columns(draft)`, which costs more than it should for every batch.
            ranking: the shard's.
        """
        self._draft = draft
        self._kinds = kinds
        self._layout = replace(draft.layout, ranking=ranking)
        self._rows = batch.num_rows
        self.visits = 0
        self._scalar_columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        self._encoded: dict[str, Any] | None = {
            name: self._scalar_columns.pop(name) for name in (*TOKENS, TARGETS)
        }
        layout, targets = self._layout, len(self._encoded[TARGETS].values)
        entries = targets * (layout.top_k + layout.tail_draws)
        tokens = len(self._encoded["input_ids"].values)
        self.nbytes: int = entries * _ENTRY_BYTES + (targets + tokens) * _TOKEN_BYTES

    @cached_property
    def _scalars(self) -> dict[str, list[Any]]:
        return {name: column.to_pylist() for name, column in self._scalar_columns.items()}

    def example_id(self, row: int) -> str:
        """The id of an example."""
        return str(self._scalars["example_id"][row])

    def features(self, row: int) -> slice:
        """Rows of the shard's feature signals that belong to an example, none without signals."""
        if FEATURES[0] not in self._scalars:
            return slice(0, 0)
        start, count = (self._scalars[name][row] for name in FEATURES)
        return slice(start, start + count)

    def decode(self) -> None:
        """Make the tensors, once; to be called by one thread at a time, before `example`.

        Raises:
            ValueError: columns that do not fit one another.
        """
        if self._encoded is None:
            return
        lists = {name: _split_list(column) for name, column in self._encoded.items()}
        self._ends = {name: offsets.tolist() for name, (offsets, _) in lists.items()}
        self._tokens = {name: lists[name][1].to_numpy().copy() for name in TOKENS}
        fields = _split_struct(lists[TARGETS][1], self._kinds)
        self._positions = fields["position"][:, 0].copy()
        self._labels = fields["label_id"][:, 0].copy()
        self._targets = self._decode_targets(fields)
        counts = np.diff(lists[TARGETS][0])
        if self._draft.shifted:
            self._shifted = self._find_shifted(lists["input_ids"][0], counts)
        else:
            self._shifted = np.zeros(len(counts), dtype=bool)
        self._encoded = None  # frees as much memory as the tensors take

    def is_spent(self) -> bool:
        """Whether as many examples were given out as it has: an epoch needs it no more."""
        return self.visits >= int(self._rows)

    def is_shifted(self, row: int) -> bool:
        """Whether some label of an example is not the token after its position."""
        return bool(self._shifted[row])

    def example(self, row: int, hidden: Mapping[str, torch.Tensor]) -> CachedExample:
        """One example with its hidden states."""
        self.visits += 1
        tokens, segments, targets = (
            slice(self._ends[name][row], self._ends[name][row + 1]) for name in (*TOKENS, TARGETS)
        )
        columns: dict[str, Column] = {
            name: self._scalars[name][row] for name in self._draft.columns
        }
        return CachedExample(
            example_id=self.example_id(row),
            input_ids=self._tokens["input_ids"][tokens],
            segment_lengths=self._tokens["segment_lengths"][segments],
            target_positions=self._positions[targets],
            label_ids=self._labels[targets],
            columns=columns,
            targets=self._targets if self._rows == 1 else _select(self._targets, targets),
            hidden=hidden,
        )

    def _decode_targets(self, fields: dict[str, np.ndarray]) -> Targets:
        draft = self._draft
        entries = draft.targets.codec.decode(fields, self._layout)
        return Targets(
            ids=torch.from_numpy(entries.ids),
            logits=torch.from_numpy(entries.logits),
            draw_ids=torch.from_numpy(entries.draw_ids),
            draw_logits=torch.from_numpy(entries.draw_logits),
            logsumexp=torch.from_numpy(entries.logsumexp),
            label_ids=torch.from_numpy(self._labels.astype(np.int64)),
            label_log_probs=torch.from_numpy(entries.label_log_probs),
            temperatures=draft.targets.temperatures,
            num_classes=draft.num_classes,
        )

    def _find_shifted(self, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """[examples] bool: any label that is not the token after its position."""
        after = self._positions + np.repeat(starts[:-1] + 1, counts)
        inside = after < np.repeat(starts[1:], counts)
        tokens = self._tokens["input_ids"].take(after, mode="clip")
        wrong = (self._labels != UNLABELLED) & ~(inside & (tokens == self._labels))
        owners = np.repeat(np.arange(len(counts)), counts)
        shifted: np.ndarray = np.bincount(owners[wrong], minlength=len(counts)) > 0
        return shifted


def _select(whole: Targets, rows: slice) -> Targets:
    # Twice as fast as Targets.select, and this is what short examples spend their time on.
    return Targets(
        whole.ids[rows],
        whole.logits[rows],
        whole.draw_ids[rows],
        whole.draw_logits[rows],
        whole.logsumexp[rows],
        whole.label_ids[rows],
        whole.label_log_probs[rows],
        whole.temperatures,
        whole.num_classes,
    )


def _split_list(column: Any) -> tuple[np.ndarray, Any]:
    return column.offsets.to_numpy(), column.values


def _split_struct(targets: Any, kinds: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Fields of N structs, [N, W] each."""
    fields: dict[str, np.ndarray] = {}
    for index, (name, (_, width)) in enumerate(kinds.items()):
        values = targets.field(index)
        flat = values.values if width > 1 else values
        fields[name] = flat.to_numpy().reshape(-1, width)
    return fields
