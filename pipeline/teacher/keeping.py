"""What is kept of the teacher's answers, and the hidden part of it.

hidden states + attention vectors of a batch -- keep_states --> signal -> rows at feature positions
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.attention import HeadShape


@dataclass(frozen=True)
class CaptureSpec:
    """What is kept of the teacher's answers.

    Attributes:
        top_k, tail_draws, temperatures: see `sparse_targets`.
        layers: signal name -> index into the hidden states, 0 for the embeddings.
        attention: signal name -> what its vectors are made of, see `name_attention`.
        pooled: whether the pooled vector is kept.
        head: whether what the output head is given is kept.
        hidden_dtype: in which layers reach the CPU; pooled vectors are float32.
    """

    top_k: int
    tail_draws: int = 0
    temperatures: tuple[float, ...] = (1.0,)
    layers: Mapping[str, int] = field(default_factory=dict)
    attention: Mapping[str, HeadShape] = field(default_factory=dict)
    pooled: bool = False
    head: bool = False
    hidden_dtype: torch.dtype = torch.float32

    @property
    def needs_states(self) -> bool:
        """Whether the model must return its hidden states."""
        return bool(self.layers) or self.pooled

    def hidden_bytes(self, width: int) -> int:
        """Of one position in memory, at most, with hidden states of so many numbers."""
        attention = sum(shape.total for shape in self.attention.values())
        numbers = (len(self.layers) + self.head) * width + attention
        return numbers * self.hidden_dtype.itemsize


def keep_states(
    given: Tensor,
    states: Sequence[Tensor],
    attention: Mapping[str, Tensor],
    feature_index: Tensor,
    spec: CaptureSpec,
) -> dict[str, Tensor]:
    """The signals of a batch at the feature positions, [M, D] each.

    Args:
        given: [B * T, D], what the output head is given, where that is kept.
        states: embeddings and layers, [B, T, D] each, as far as `spec` needs them.
        attention: by signal, [B, T, heads, width] each.
        feature_index: [M] flat positions b * T + t.
    """
    rows = {name: states[index].flatten(0, 1) for name, index in spec.layers.items()}
    rows |= {name: attention[name].flatten(2).flatten(0, 1) for name in spec.attention}
    if spec.head:
        rows["head"] = given
    return {name: select(of, feature_index).to(spec.hidden_dtype) for name, of in rows.items()}


def select(rows: Tensor, index: Tensor) -> Tensor:
    """Some rows, by an index on any device."""
    return rows.index_select(0, send(index, rows.device))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
