"""The terms of a student's loss on one batch, before anything is normalised.

model + batch -> run_student -> StudentOutputs -> each loss, one value per position -> its sum
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Loss, StudentOutputs

PROJECTIONS = "distillation_projections"  # the attribute that holds the losses' parameters


def attach_projections(
    model: PreTrainedModel, losses: Sequence[Loss], teacher_widths: Mapping[str, int]
) -> None:
    """Give the student the learned parameters of its losses, so that they train and checkpoint."""
    width = int(getattr(model.config, "hidden_size", 0))
    modules = nn.ModuleDict()
    for index, loss in enumerate(losses):
        teacher_width = next(
            (teacher_widths[signal] for signal in _signals(loss) if signal in teacher_widths), 0
        )
        modules[str(index)] = loss.projections(width, teacher_width)
    model.add_module(PROJECTIONS, modules)


def projections_of(model: nn.Module) -> nn.ModuleDict:
    """The module `attach_projections` added, under any wrapper."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    found = getattr(inner, PROJECTIONS)
    assert isinstance(found, nn.ModuleDict)
    return found


def run_student(
    model: nn.Module, batch: Mapping[str, Any], losses: Sequence[Loss]
) -> tuple[Any, StudentOutputs]:
    """Call the student and keep what counts: logits at targets, hidden states at features."""
    layers = sorted({layer for loss in losses for layer in loss.layer_map})
    pooled = any(loss.needs_pooled for loss in losses)
    wanted = {"output_hidden_states": True} if layers or pooled else {}
    outputs = model(**batch["inputs"], **wanted)
    logits = outputs.logits.flatten(0, -2).index_select(0, batch["target_index"])
    if not (layers or pooled):
        return outputs, StudentOutputs(logits)
    depth = len(outputs.hidden_states)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(
                f"losses: the student has no layer {layer}; it has 0 (embeddings) to {depth - 1}"
            )
    hidden = {
        layer: outputs.hidden_states[layer].flatten(0, 1).index_select(0, batch["feature_index"])
        for layer in layers
    }
    vector = pool(outputs.hidden_states[-1], batch["token_mask"]) if pooled else None
    return outputs, StudentOutputs(logits, hidden, vector)


def pool(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """Mean of [B, T, D] over the tokens that are not padding (mask [B, T]), [B, D]."""
    mask = token_mask.unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def sum_terms(
    losses: Sequence[Loss],
    student: StudentOutputs,
    batch: Mapping[str, Any],
    projections: nn.ModuleDict,
) -> list[Tensor]:
    """The sum of each loss over its valid units of this batch."""
    knowledge = Knowledge(batch.get("targets"), batch["label_ids"], batch.get("hidden", {}))
    sums = []
    for index, loss in enumerate(losses):
        own = projections[str(index)]
        assert isinstance(own, nn.ModuleDict)
        sums.append(loss.per_position(student, knowledge, own).sum())
    return sums


def _signals(loss: Loss) -> list[str]:
    layers = [f"layer.{layer}" for layer in loss.layer_map.values()]
    return [*layers, "pooled"] if loss.needs_pooled else layers


def name_terms(losses: Sequence[Loss]) -> list[str]:
    """Names that tell two terms of one kind apart."""
    names: list[str] = []
    for loss in losses:
        same = sum(name.split("#")[0] == loss.name for name in names)
        names.append(f"{loss.name}#{same + 1}" if same else loss.name)
    return names


def printed_scale(loss: Loss) -> float:
    """T², which belongs to the gradient: terms are logged without it, comparable across runs."""
    return float(np.square(loss.temperature_needed or 1.0))
