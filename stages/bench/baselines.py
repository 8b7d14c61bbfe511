"""What the same work costs without a cache, or with the usual kind of one.

forward_all     the teacher as anybody would call it: model(**inputs), logits and nothing else
LabelledBlocks  for cross-entropy by transformers.Trainer: all data ready in memory
LiveTrainer     distillation with the teacher's forward pass in every step
write_parquet   int32 ids and float16 logits as lists in Parquet, read by `datasets`
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from transformers import Trainer

from pipeline.cache import TeacherCache
from pipeline.examples import CachedExample, Example
from pipeline.targets import UNLABELLED
from pipeline.tasks import Task
from stages.bench.measuring import finish_device_work

Inputs = dict[str, Tensor]

_ROW_GROUP = 64


def forward_all(model: Any, batches: Sequence[Inputs]) -> float:
    """Seconds of `model(**inputs)` on every batch: logits [B, T, V], nothing kept."""
    device = model.get_input_embeddings().weight.device
    began = time.perf_counter()
    with torch.inference_mode():
        for inputs in batches:
            model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    finish_device_work()
    return time.perf_counter() - began


class LabelledBlocks(torch.utils.data.Dataset[Inputs]):
    """Examples of one length as inputs with `labels`, made beforehand and held in memory.

    A label that a target was not asked about (the first token of a document) is left out.
    """

    def __init__(self, examples: Sequence[Example], task: Task) -> None:
        self._rows = [self._label(example, task) for example in examples]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Inputs:
        return self._rows[index]

    @staticmethod
    def _label(example: Example, task: Task) -> Inputs:
        inputs = {name: tensor[0] for name, tensor in task.batch([example], 0).inputs.items()}
        labels = torch.full_like(inputs["input_ids"], UNLABELLED)
        after = example.target_positions + 1
        labels[after] = torch.from_numpy(example.label_ids.astype(np.int64))
        return {**inputs, "labels": labels}


class LiveTrainer(Trainer):  # type: ignore[misc]
    """Online distillation: 0.9 dense KL from the teacher's logits + 0.1 cross-entropy."""

    def __init__(self, teacher: nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher = teacher

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Both terms as means over the labelled positions of the batch."""
        labels = inputs["labels"][:, 1:]
        known = labels != UNLABELLED
        asked = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        outputs = model(**asked)
        with torch.no_grad():
            said = self._teacher(**asked).logits[:, :-1][known].float().log_softmax(-1)
        own = outputs.logits[:, :-1][known].float().log_softmax(-1)
        divergence = kl_div(own, said, reduction="batchmean", log_target=True)
        loss = 0.9 * divergence + 0.1 * nll_loss(own, labels[known])
        return (loss, outputs) if return_outputs else loss


def write_parquet(cache: TeacherCache, path: Path) -> Path:
    """Write what a cache holds as lists: int32 ids, float16 logits and hidden states, the rest
    float32; Parquet's own compression and encodings as they come."""
    schema, writer = None, None
    for start in range(0, len(cache), _ROW_GROUP):
        rows = [cache[index] for index in range(start, min(start + _ROW_GROUP, len(cache)))]
        table = pa.table(_columns(rows), schema=schema)
        if writer is None:
            schema, writer = table.schema, pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None  # a cache has examples
    writer.close()
    return path


def open_parquet(path: Path, scratch: Path) -> Any:
    """Open it as `datasets` does: converted once to memory-mapped Arrow, rows as numpy arrays."""
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(scratch)).with_format("numpy")


def join_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of `open_parquet` as one batch: padded input ids, everything else end to end."""
    joined = {
        name: torch.from_numpy(np.concatenate([np.asarray(row[name]) for row in rows]))
        for name in rows[0]
        if name not in ("example_id", "input_ids")
    }
    ids = [torch.from_numpy(np.asarray(row["input_ids"], dtype=np.int64)) for row in rows]
    joined["input_ids"] = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return joined


def join_table(table: Any) -> dict[str, Tensor]:
    """Rows in arrow format as one batch, all end to end, as wide as a loss takes them; no padding.

    The fastest way that `datasets` offers: no Python object is made per row.
    """
    joined = {}
    for name in table.column_names:
        if name != "example_id":
            values = table[name].combine_chunks()
            while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                values = values.flatten()
            array = values.to_numpy(zero_copy_only=False)
            kind = np.float32 if array.dtype.kind == "f" else np.int64
            joined[name] = torch.from_numpy(array.astype(kind))
    return joined


def _columns(rows: Sequence[CachedExample]) -> dict[str, Any]:
    columns: dict[str, Any] = {"example_id": pa.array([row.example_id for row in rows])}
    for name in ("input_ids", "segment_lengths", "target_positions", "label_ids"):
        columns[name] = _nest([getattr(row, name).astype(np.int32) for row in rows])
    kinds = {"ids": np.int32, "logits": np.float16, "draw_ids": np.int32, "draw_logits": np.float16}
    for name, kind in (kinds | {"logsumexp": np.float32}).items():
        values = [getattr(row.targets, name).numpy().astype(kind) for row in rows]
        if values[0].shape[1]:
            columns[name] = _nest(values)
    columns["label_log_prob"] = _nest([row.targets.label_log_probs.numpy() for row in rows])
    for name in rows[0].hidden:
        columns[name] = _nest([row.hidden[name].numpy().astype(np.float16) for row in rows])
    return columns


def _nest(values: Sequence[np.ndarray]) -> Any:
    """[N] or [N, W] arrays of several rows as one Arrow array of lists, or of lists of lists."""
    joined = np.concatenate(values)
    inner = pa.array(joined.ravel())
    if joined.ndim == 2:
        steps = np.arange(0, joined.size + 1, joined.shape[1], dtype=np.int32)
        inner = pa.ListArray.from_arrays(pa.array(steps), inner)
    ends = np.cumsum([0, *(len(one) for one in values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), inner)
