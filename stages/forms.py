"""The forms of a deployed student: each writes its weights and gives back a model to measure.

FORMATS: a name -> a function of a finished run, a folder and a dtype
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.examples import Example
from pipeline.export import (
    GraphStudent,
    copy_weights,
    drop_weights,
    load_int8,
    save_int8,
    save_onnx,
    write_settings,
)
from pipeline.safe_loading import NO_CODE
from pipeline.sentences import SentenceHead
from pipeline.student.key_values import without_cache
from pipeline.tasks import Task
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
    run.reading.task.save(run.load().to(precision), folder)
    return Saved(run.load(folder).to(precision))


def _export_int8(run: FinishedRun, folder: Path, dtype: str | None) -> Saved:
    task, model = run.reading.task, run.load()
    total = model.num_parameters()
    task.save(model, folder)
    bare = getattr(transformers, task.auto_class).from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, **NO_CODE
    )
    drop_weights(folder)
    count = save_int8(bare, task.auto_class, folder)
    opened = load_int8(folder)
    task.equip(opened, str(folder))
    note = f"int8: {count:,} of {total:,} weights ({100 * count / total:.1f} %), the rest float32"
    return Saved(opened, [note])


def _export_onnx(run: FinishedRun, folder: Path, dtype: str | None) -> Saved:
    task, model, examples = run.reading.task, run.load(), _first_examples(run)
    widest = sorted(examples, key=lambda e: (len(e.segment_lengths), len(e.input_ids)))[-2:]
    batch = run.reading.collator([])([*widest, *widest][:2])  # two rows at least
    inputs = task.model_inputs(model, batch["inputs"])
    extra = {"sentence_embedding": partial(_pool, task, model)} if task.pooled else {}
    if task.pooled:
        task.save(model, folder)  # for the files of its head
        drop_weights(folder)
    save_onnx(model, inputs, folder, extra)
    graph = GraphStudent(folder, model.config)
    task.equip(graph, str(folder))
    note = _compare(run, examples, model, graph)
    return Saved(graph, [f"onnx: takes {', '.join(inputs)}; {note}"], list(inputs))


def _export_sentences(run: FinishedRun, folder: Path, dtype: str | None) -> Saved:
    task, model = run.reading.task, run.load()
    if task.pooled:
        task.save(model, folder)
        write_settings(folder)
        return Saved(run.load(folder))
    encoder = _encoder_of(model, task)
    encoder.save_pretrained(folder)
    head = SentenceHead()
    head.save(folder, encoder.config.hidden_size, getattr(task, "max_length", None))
    write_settings(folder)
    note = "the mean of the encoder's last hidden states, which was not trained to be a vector"
    return Saved(None, [f"sentence-transformers: {note}"])


def _encoder_of(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The student without its head.

    Raises:
        ModelError: it has none by itself, or is no encoder.
    """
    encoder = model.base_model
    reads_both_ways = task.auto_class != "AutoModelForCausalLM"
    if encoder is model or model.config.is_encoder_decoder or not reads_both_ways:
        raise ModelError(
            f"{type(model).__name__}: has no encoder by itself whose states could be pooled; export"
            " it as transformers, or train a student of the task sentence-embeddings"
        )
    return encoder


def _pool(task: Task, model: nn.Module, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return task.pool(model, outputs.last_hidden_state, inputs["attention_mask"].bool())


def _first_examples(run: FinishedRun) -> list[Example]:
    held_out = run.reading.select(run.config.evaluation.split)
    return [held_out[index] for index in range(min(len(held_out), _COMPARED))]


@torch.inference_mode()
def _compare(
    run: FinishedRun, examples: Sequence[Example], model: nn.Module, graph: nn.Module
) -> str:
    """How far the graph's logits at the targets, or its vectors, are from the model's."""
    collator, task, size = run.reading.collator([]), run.reading.task, 16
    difference = largest = 0.0
    for start in range(0, len(examples), size):
        batch = collator(examples[start : start + size])
        inputs, index = batch["inputs"], batch["target_index"]
        with without_cache(model):
            given = task.model_inputs(model, inputs)
            own, other = model(**given), graph(**given)
        if task.pooled:
            expected, found = _pool(task, model, own, inputs), other.sentence_embedding
        else:
            expected, found = (task.logits(answer, inputs)[index] for answer in (own, other))
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    kind = "numbers of its vectors" if task.pooled else "logits"
    return (
        f"over {len(examples)} held-out examples {kind} of up to {largest:.3g} differ by at most"
        f" {difference:.1e}"
    )


FORMATS: Mapping[str, Callable[[FinishedRun, Path, str | None], Saved]] = {
    "transformers": _export_transformers,
    "int8": _export_int8,
    "onnx": _export_onnx,
    "sentence-transformers": _export_sentences,
}
