"""Held-out measurement: per-target scores of a model, then the task's metrics, per slice.

examples -> batches -> logits -> Scores -> Task.metrics, for all and for each value of a column
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from pipeline.batches import Collator, Selection
from pipeline.errors import ModelError
from pipeline.examples import CachedExample, Example
from pipeline.heads import OutputHead, head_input
from pipeline.losses.base import Knowledge, StudentOutputs
from pipeline.losses.divergences import ForwardKL
from pipeline.metrics import Metric
from pipeline.outputs import unwrap
from pipeline.scores import Observation, Scores
from pipeline.student.key_values import without_cache
from pipeline.targets import UNLABELLED, Targets
from pipeline.tasks.base import Task
from pipeline.terms import find_head

_ELEMENTS = 1 << 24  # of logits that are held at a time, 64 MB of float32


def score_model(
    model: nn.Module,
    examples: Selection,
    collator: Collator,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: Any = None,
) -> Scores:
    """Score every target of the examples; with several ranks each takes a share and all get all.

    Args:
        model: in evaluation mode, on the device it should run on.
        tokenizer: the model's, for metrics of text.
        examples: held-out examples; with cached targets, agreement and KL are measured too.
        batch_size: examples per forward pass.
    """
    device = next(model.parameters()).device
    task, parts = collator.task, list[Scores]()
    head: OutputHead | None = None
    for chunk in _chunks(range(rank, len(examples), world_size), batch_size):
        batch_examples = [examples[index] for index in chunk]
        batch = collator(batch_examples)
        with torch.inference_mode(), without_cache(model):
            moved = _move(batch, device)
            if not parts and task.vocabulary:
                head = _find_head(model, moved["targets"])
            outputs, pieces = _run(model, head, moved, task)
            scored = [
                _score_rows(logits, moved["label_ids"][rows], _select(moved["targets"], rows))
                for rows, logits in pieces
            ]
            seen = Observation(
                model=model,
                tokenizer=tokenizer,
                inputs=moved["inputs"],
                outputs=outputs,
                logits=pieces[0][1] if isinstance(pieces, list) else None,
                examples=batch_examples,
            )
            observed = task.observe(seen)
        parts.append(_scores(batch_examples, observed, **_cat(scored)))
    if world_size > 1:
        parts = gather_object(parts)
    return _join(parts)


def teacher_scores(examples: Selection, task: Task | None = None, tokenizer: Any = None) -> Scores:
    """The teacher's own scores on cached examples, from the cache alone.

    Args:
        task, tokenizer: the cache's, for what the task recalls beyond the scores of targets.
    """
    parts = []
    for index in range(len(examples)):
        example = examples[index]
        assert isinstance(example, CachedExample)
        targets = example.targets
        confidence = targets.confidence()
        parts.append(
            _scores(
                [example],
                {} if task is None else task.recall(example, tokenizer),
                label_ids=torch.from_numpy(example.label_ids.astype(np.int64)),
                predictions=targets.first_choice()[0],
                confidence=confidence,
                label_log_probs=targets.label_log_probs,
                kl_to_teacher=torch.full_like(confidence, torch.nan),
                agreement=torch.full_like(confidence, torch.nan),
            )
        )
    return _join(parts)


def measure(task: Task, scores: Scores, slices: Sequence[str] = ()) -> list[Metric]:
    """The task's metrics over all targets, then for each value of each slice column."""
    found = task.metrics(scores)
    for column in slices:
        values = scores.columns[column]
        for value in sorted({str(v) for v in values}):
            part = scores.where(values.astype(str) == value)
            found += [
                dataclasses.replace(metric, slice=f"{column}={value}")
                for metric in task.metrics(part)
            ]
    return found


def _move(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    targets = batch.get("targets")
    return {
        "inputs": {name: tensor.to(device) for name, tensor in batch["inputs"].items()},
        "target_index": batch["target_index"].to(device),
        "label_ids": batch["label_ids"].to(device),
        "targets": None if targets is None else targets.to(device),
    }


def _find_head(model: nn.Module, targets: Targets | None) -> OutputHead | None:
    try:
        return find_head(model, None if targets is None else targets.num_classes)
    except ModelError:
        return None  # whole logits will do


def _run(
    model: nn.Module, head: OutputHead | None, batch: Mapping[str, Any], task: Task
) -> tuple[Any, Iterable[tuple[slice, Tensor]]]:
    """What the model returns, and logits at the targets: pieces where the head can stand alone,
    else a list of one."""
    index, inputs = batch["target_index"], task.model_inputs(model, batch["inputs"])
    if head is None:
        outputs = model(**inputs)
        rows = task.logits(outputs, batch["inputs"])
        return outputs, [(slice(None), rows.index_select(0, index).float())]
    with head_input(unwrap(model)) as seen:
        outputs = model(**inputs)
    return outputs, _pieces(head, seen[0].flatten(0, -2).index_select(0, index))


def _pieces(head: OutputHead, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, _ELEMENTS // head.num_classes)
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, start + size)
        yield rows, head(hidden[rows])


def _select(targets: Targets | None, rows: slice) -> Targets | None:
    return None if targets is None else targets.select(rows)


def _cat(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score_rows(logits: Tensor, label_ids: Tensor, targets: Targets | None) -> dict[str, Tensor]:
    if targets is not None:
        logits = logits[:, : targets.num_classes]
    normalizer = torch.logsumexp(logits, dim=-1)
    best, predictions = logits.max(dim=-1)
    label_logits = logits.gather(1, label_ids.clamp(min=0)[:, None])[:, 0]
    unknown = torch.full_like(normalizer, torch.nan)
    kl, agreement = unknown, unknown
    if targets is not None:
        student = StudentOutputs(logits)
        knowledge = Knowledge(targets, label_ids)
        kl = ForwardKL().per_position(student, knowledge, nn.ModuleDict())
        if targets.ids.shape[1]:
            agreement = (targets.first_choice()[0] == predictions).float()
    return {
        "label_ids": label_ids,
        "predictions": predictions,
        "confidence": torch.exp(best - normalizer),
        "label_log_probs": torch.where(label_ids == UNLABELLED, 0.0, label_logits - normalizer),
        "kl_to_teacher": kl,
        "agreement": agreement,
    }


def _scores(
    examples: Sequence[Example], observed: Mapping[str, np.ndarray], **tensors: Tensor
) -> Scores:
    counts = [len(example.target_positions) for example in examples]
    columns = {"example_id": _repeat([e.example_id for e in examples], counts)}
    for name in examples[0].columns:
        columns[name] = _repeat([e.columns.get(name) for e in examples], counts)
    whole = {"label_ids", "predictions"}
    arrays = {
        name: tensor.cpu().numpy().astype(np.int64 if name in whole else np.float64)
        for name, tensor in tensors.items()
    }
    return Scores(**arrays, columns=columns, observed=observed)


def _repeat(values: Sequence[Any], counts: Sequence[int]) -> np.ndarray:
    """A column by target; a list stays one value."""
    return np.repeat(np.fromiter(values, dtype=object, count=len(values)), counts)


def _join(parts: Sequence[Scores]) -> Scores:
    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {name: join([value[name] for value in values]) for name in values[0]}
        return np.concatenate(values)

    names = [field.name for field in dataclasses.fields(Scores)]
    return Scores(**{name: join([getattr(part, name) for part in parts]) for name in names})


def _chunks(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for index in indices:
        chunk.append(index)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
