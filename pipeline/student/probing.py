"""Whether a student reads as its task means it to: asked of the model itself, not of its name."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.examples import Example
from pipeline.student.key_values import without_cache
from pipeline.tasks.base import Task

_LENGTH = 6  # tokens per probed document


@torch.no_grad()
def require_causal(model: Any, task: Task, name: str) -> None:
    """Refuse a model that sees later tokens, or other documents where a task packs them.

    Either would let a student copy what it is asked to predict. A decoder may see all that its
    encoder reads, and of its own input what came before.

    Args:
        model: with the task's head; models of sequences are not asked.
        name: for messages.

    Raises:
        ModelError: it looks ahead, or where it should not look.
    """
    if task.auto_class not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        return
    was_training = model.training
    with without_cache(model.eval()):
        plain, later, other = (_logits(model, task, change) for change in ("none", "last", "first"))
    model.train(was_training)
    if _differ(plain[:, :-1], later[:, :-1]):
        raise ModelError(
            f"{name}: {type(model).__name__} sees the tokens it should predict; choose a causal"
            " language model"
        )
    if getattr(task, "packing", False) and _differ(plain[:, _LENGTH:], other[:, _LENGTH:]):
        raise ModelError(
            f"{name}: documents packed into one row see one another in {type(model).__name__};"
            " choose another architecture, or cache the teacher with task.packing false"
        )


def _logits(model: Any, task: Task, change: str) -> Tensor:
    """Two rows of two segments; `change` moves the last token that is read, or segment one."""
    ids = np.arange(2 * _LENGTH, dtype=np.int32) % 2
    if change == "last":
        read = -2 if task.segments == "streams" else -1  # a decoder is not given the very last
        ids[read] = 1 - ids[read]
    elif change == "first":
        ids[:_LENGTH] = 1 - ids[:_LENGTH]
    lengths = np.array([_LENGTH, _LENGTH], dtype=np.int32)
    example = Example("probe", ids, lengths, np.arange(2 * _LENGTH, dtype=np.int32), ids)
    inputs = task.batch([example, example], 0).inputs
    logits: Tensor = model(**inputs).logits
    return logits


def _differ(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max())
    return float((one - other).abs().max()) > 1e-4 * scale
