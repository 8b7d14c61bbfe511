"""The output head of a language model, applied to chosen hidden states only.

    hidden [n, D] -- weight, bias --> * scale --> soft-cap --> + offset --> logits [n, V] float32

A model computes logits of every position at once; a head applied to a few positions at a time
needs no [B, T, V] tensor. Models decorate their head under many names, so nothing is believed: the
head is probed against the model's own logits when it is built, and a model that it cannot reproduce
is refused.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import ModelError

_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class OutputHead:
    """The last linear map of a language model and what its configuration does to the result.

    Attributes:
        weight: [V', D] with V' >= V; rows beyond V pad the embedding and are no classes.
        bias: [V'] or None.
        scale: the factor on the logits.
        soft_cap: c of c * tanh(logits / c), after the factor; None for none.
        num_classes: V.
        offset: [V'] that a model adds to its logits and does not learn (BART's final_logits_bias),
            or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None
    num_classes: int
    offset: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states after the final norm: [n, D] -> [n, V] float32."""
        V = self.num_classes
        bias = None if self.bias is None else self.bias[:V]
        hidden = hidden.to(self.weight)
        logits = nn.functional.linear(hidden, self.weight[:V], bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        if self.offset is not None:
            logits = logits + self.offset[:V].to(logits)
        return logits

    @staticmethod
    def of(model: Any, num_classes: int) -> "OutputHead":
        """Find the head of a transformers language model: causal, masked or with a decoder.

        It is looked at inside of the model's own forward pass. There, autocast is on if the model
        runs under it, and weights that FSDP shards are whole; those of the head returned may be
        gone after the pass.

        Args:
            model: in evaluation mode.
            num_classes: V, the tokenizer's ids.

        Raises:
            ModelError: the head has fewer rows than V, is none that can be applied by itself, or
                its weights are not here even in the forward pass.
        """
        layer = _layer(model, num_classes)
        tried: list[tuple[OutputHead, Tensor, torch.dtype]] = []

        def apply(_: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> None:
            if isinstance(layer.weight, DTensor) or layer.weight.is_meta:
                return  # tensor parallelism: no process has all classes; or moved away again
            heads = _candidates(model, layer, num_classes)
            tried.extend((head, head(given[0][0]), logits.dtype) for head in heads)

        handle = layer.register_forward_hook(apply, prepend=True)  # before FSDP frees the weights
        try:
            with torch.no_grad():  # inference mode would leave tensors in caches that cannot learn
                own = model(**_probe(model, num_classes)).logits[0, :, :num_classes]
        finally:
            handle.remove()
        for head, logits, dtype in tried:
            if _agree(logits, own.float(), dtype):
                return head
        raise _no_linear_map(model)


def _layer(model: Any, num_classes: int) -> nn.Linear:
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{_name(model)}: has no linear output head over its vocabulary")
    if len(layer.weight) < num_classes:
        raise ModelError(
            f"{_name(model)}: its output head has {len(layer.weight):,} rows, the tokenizer has"
            f" {num_classes:,} ids; use the tokenizer that the model was trained with"
        )
    return layer


@contextmanager
def head_input(model: Any) -> Iterator[list[Tensor]]:
    """Collect what the output head is given, [B, T, D], and give it no position instead."""
    seen: list[Tensor] = []

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0])
        return (given[0][:, :0], *given[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


def _probe(model: Any, num_classes: int) -> dict[str, Any]:
    """A few fixed token ids, [1, T], as what the model is called with."""
    embeddings = model.get_input_embeddings().weight
    rows = min(num_classes, len(embeddings))
    steps = torch.arange(1, _PROBE_TOKENS + 1, device=embeddings.device)
    ids = (steps * 7919 % rows)[None]
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    return {"input_ids": ids} | ({"use_cache": False} if "use_cache" in accepted else {})


def _candidates(model: Any, layer: nn.Linear, num_classes: int) -> Iterator[OutputHead]:
    """The layer with everything that the model's config may mean to be done to its logits."""
    bias = None if layer.bias is None else layer.bias.detach()
    offset = getattr(model, "final_logits_bias", None)
    if offset is not None:
        offset = offset.flatten() if bool((offset != 0).any()) else None
    for scale, cap in product(*_decorations(model.config)):
        yield OutputHead(layer.weight.detach(), bias, scale, cap, num_classes, offset)


def _decorations(config: Any) -> tuple[list[float], list[float | None]]:
    """The factors and soft-caps that the config may mean; a name alone does not say `/` or `*`.

    What the config names comes first: a cap far above the probe's logits cannot be seen in them.
    """
    config = config.get_text_config()
    scales = []
    for name in _SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales += [float(value), 1.0 / value]
    caps = [float(cap) for name in _CAPS if (cap := getattr(config, name, None))]
    return [*scales, 1.0], [*caps, None]


def _agree(ours: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Equal within a few roundings of the model's dtype."""
    tolerance = 8 * torch.finfo(dtype).eps * float(own.abs().max().clamp(min=1e-3))
    return bool(((ours - own.to(ours)).abs() <= tolerance).all())


def _no_linear_map(model: Any) -> ModelError:
    return ModelError(
        f"{_name(model)}: its logits are no scaled, soft-capped linear map of its last hidden"
        " states"
    )


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
