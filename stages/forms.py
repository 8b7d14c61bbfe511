"""The forms of a deployed student: each writes its weights and gives back a model to measure.

FORMATS: a name -> a function of a finished run, a folder and a dtype
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.examples import Example
from pipeline.export import (
    GraphStudent,
    copy_weights,
    load_int8,
    save_as,
    save_int8,
    save_onnx,
)
from pipeline.student.key_values import without_cache
from stages.evaluate import FinishedRun

_COMPARED = 64  # held-out examples whose logits are compared


@dataclass(frozen=True)
class Saved:
    """What a format wrote.

    Attributes:
        model: as a user opens it, to be measured; None where no number changed.
        notes: what there is to know, one sentence each.
        inputs: the names of what a graph takes.
    """

    model: nn.Module | None = None
    notes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


def _export_transformers(run: FinishedRun, folder: Path, dtype: str | None) -> Saved:
    if dtype is None:
        copy_weights(run.folder, folder)
        return Saved()
    precision: torch.dtype = getattr(torch, dtype)
    save_as(run.load(), precision, folder)
    return Saved(run.load(folder).to(precision))


def _export_int8(run: FinishedRun, folder: Path, dtype: str | None) -> Saved:
    model = run.load()
    total = model.num_parameters()
    count = save_int8(model, run.reading.task.auto_class, folder)
    note = f"int8: {count:,} of {total:,} weights ({100 * count / total:.1f} %), the rest float32"
    return Saved(load_int8(folder), [note])


def _export_onnx(run: FinishedRun, folder: Path, dtype: str | None) -> Saved:
    model, examples = run.load(), _first_examples(run)
    widest = sorted(examples, key=lambda e: (len(e.segment_lengths), len(e.input_ids)))[-2:]
    batch = run.reading.collator([])([*widest, *widest][:2])  # two rows at least
    inputs = run.reading.task.model_inputs(model, batch["inputs"])
    save_onnx(model, inputs, folder)
    graph = GraphStudent(folder, model.config)
    difference, largest = _compare_logits(run, examples, model, graph)
    note = (
        f"onnx: takes {', '.join(inputs)}; over {len(examples)} held-out examples logits of up to"
        f" {largest:.3g} differ by at most {difference:.1e}"
    )
    return Saved(graph, [note], list(inputs))


def _first_examples(run: FinishedRun) -> list[Example]:
    held_out = run.reading.select(run.config.evaluation.split)
    return [held_out[index] for index in range(min(len(held_out), _COMPARED))]


@torch.inference_mode()
def _compare_logits(
    run: FinishedRun, examples: list[Example], one: nn.Module, other: nn.Module
) -> tuple[float, float]:
    """The largest difference of two models' logits at the targets, and the largest logit."""
    collator, task, size = run.reading.collator([]), run.reading.task, 16
    difference = largest = 0.0
    for start in range(0, len(examples), size):
        batch = collator(examples[start : start + size])
        inputs, index = batch["inputs"], batch["target_index"]
        with without_cache(one):
            given = task.model_inputs(one, inputs)
            expected, found = (task.logits(m(**given), inputs)[index] for m in (one, other))
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference, largest


FORMATS: Mapping[str, Callable[[FinishedRun, Path, str | None], Saved]] = {
    "transformers": _export_transformers,
    "int8": _export_int8,
    "onnx": _export_onnx,
}
