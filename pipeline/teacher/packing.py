"""Whether a model keeps packed documents apart: asked of the model itself, not of its name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.examples import Example

_LENGTH = 12  # tokens per probed document; several rows, since some kernels isolate only one


def drop_unknown(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without `position_ids` where a model numbers positions by itself."""
    parameters = inspect.signature(model.forward).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = is_open or "position_ids" in parameters
    return {name: value for name, value in inputs.items() if known or name != "position_ids"}


@torch.no_grad()
def require_isolation(model: Any, make_inputs: Callable[[Sequence[Example]], Any]) -> None:
    """Change the first document of packed rows; nothing of the second may move.

    Args:
        model: a causal language model in evaluation mode.
        make_inputs: the task's batching, from examples to what the model is called with.

    Raises:
        ModelError: the second document saw the first.
    """
    device = model.get_input_embeddings().weight.device
    answers = []
    for rows in (_packed_rows(0), _packed_rows(1)):
        inputs = drop_unknown(model, make_inputs(rows))
        answers.append(model(**{name: value.to(device) for name, value in inputs.items()}).logits)
    first, second = answers
    moved = (first - second).float().abs()[:, _LENGTH:]
    scale = float(first.float().abs().max())
    if float(moved.max()) > 64 * torch.finfo(first.dtype).eps * scale:
        raise ModelError(
            f"{model.name_or_path}: documents packed into one row see one another in this model"
            f" ({type(model).__name__}, attention {model.config._attn_implementation}); set"
            " task.packing to false, or teacher.attn_implementation to sdpa"
        )


def _packed_rows(change: int) -> list[Example]:
    """Two rows of two documents each; `change` moves every token of the first documents."""
    rows = []
    for row in range(2):
        ids = 1 + (np.arange(2 * _LENGTH, dtype=np.int32) * 7 + row) % 37
        ids[:_LENGTH] = 1 + (ids[:_LENGTH] + 5 * change) % 37
        rows.append(
            Example(
                example_id=f"probe {row}",
                input_ids=ids,
                segment_lengths=np.array([_LENGTH, _LENGTH], dtype=np.int32),
                target_positions=np.arange(2 * _LENGTH, dtype=np.int32),
                label_ids=ids,
            )
        )
    return rows
