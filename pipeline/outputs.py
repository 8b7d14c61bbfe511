"""What a student says at the positions of a batch that count.

model + batch + what losses compare -> one forward pass -> StudentOutputs
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.losses.base import Loss, StudentOutputs
from pipeline.tasks.base import Task


def run_student(
    model: nn.Module, batch: Mapping[str, Any], losses: Sequence[Loss], task: Task
) -> tuple[Any, StudentOutputs]:
    """Call the student and keep what counts: logits at targets, hidden states at features.

    Raises:
        ConfigError: a loss compares a layer that the student does not have.
    """
    signals = sorted({signal for loss in losses for signal in loss.compares})
    outputs = model(**batch["inputs"], **({"output_hidden_states": True} if signals else {}))
    logits = task.logits(outputs, batch["inputs"])
    if len(logits):
        logits = logits.index_select(0, batch["target_index"])
    if not signals:
        return outputs, StudentOutputs(logits)
    states = task.hidden_states(outputs)
    return outputs, StudentOutputs(logits, {s: _read(s, states, batch) for s in signals})


def _read(signal: str, states: Sequence[Tensor], batch: Mapping[str, Any]) -> Tensor:
    if signal == "pooled":
        return pool(states[-1], batch["token_mask"])
    layer, depth = int(signal.partition(".")[2]), len(states)
    if not -depth <= layer < depth:
        raise ConfigError(
            f"losses: the student has no layer {layer}; it has 0 (embeddings) to {depth - 1}"
        )
    return states[layer].flatten(0, 1).index_select(0, batch["feature_index"])


def pool(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """Mean of [B, T, D] over the tokens that are not padding (mask [B, T]), [B, D]."""
    mask = token_mask.unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
