"""What a student says at the positions of a batch that count.

model + batch + what losses compare -> one forward pass -> StudentOutputs
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.attention import PARTS, watch_attention
from pipeline.errors import ConfigError, ModelError
from pipeline.losses.base import Knowledge, Loss, StudentOutputs
from pipeline.tasks.base import Task


def run_student(
    model: nn.Module, batch: Mapping[str, Any], losses: Sequence[Loss], task: Task
) -> tuple[Any, StudentOutputs]:
    """Call the student and keep what counts: logits at targets, hidden states at features.

    Raises:
        ConfigError: a loss compares a layer that the student does not have.
        ModelError: its attention is not where it is looked for.
    """
    signals = sorted({signal for loss in losses for signal in loss.compares})
    attention = [signal for signal in signals if signal.partition(".")[0] in PARTS]
    wanted = {"output_hidden_states": True} if len(signals) > len(attention) else {}
    with watch_attention(unwrap(model), attention) as seen:
        outputs = model(**task.model_inputs(model, batch["inputs"]), **wanted)
    logits = task.logits(outputs, batch["inputs"])
    if len(logits):
        logits = logits.index_select(0, batch["target_index"])
    states = task.hidden_states(outputs) if wanted else ()
    hidden = {}
    for signal in signals:
        if signal == "pooled":
            hidden[signal] = task.pool(unwrap(model), states[-1], batch["token_mask"])
        else:
            rows = _find(seen, signal) if signal in attention else _layer(states, signal)
            hidden[signal] = rows.flatten(0, 1).index_select(0, batch["feature_index"])
    return outputs, StudentOutputs(logits, hidden)


def _layer(states: Sequence[Tensor], signal: str) -> Tensor:
    layer, depth = int(signal.partition(".")[2]), len(states)
    if not -depth <= layer < depth:
        raise ConfigError(
            f"losses: the student has no layer {layer}; it has 0 (embeddings) to {depth - 1}"
        )
    return states[layer]


def _find(seen: Mapping[str, Tensor], signal: str) -> Tensor:
    if signal not in seen:
        raise ModelError(
            f"losses: the student's attention was not seen at work ({signal}); set the layerdrop of"
            " its config to 0, and leave out training.torch_compile"
        )
    return seen[signal]


def unwrap(model: nn.Module) -> Any:
    """The student itself, without DDP's and the like's wrapping."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def read_knowledge(batch: Mapping[str, Any]) -> Knowledge:
    """What the losses are told of a batch."""
    others = {
        name: read_knowledge({"label_ids": batch["label_ids"], **said})
        for name, said in batch.get("teachers", {}).items()
    }
    return Knowledge(
        batch.get("targets"),
        batch["label_ids"],
        batch.get("hidden", {}),
        batch.get("documents"),
        batch.get("example_keys"),
        batch.get("shares", {}),
        others,
        batch.get("numbers"),
    )
