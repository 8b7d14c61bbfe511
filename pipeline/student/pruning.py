"""A pruned model: the same embeddings and head over copies of some of its layers."""

import copy
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn

from pipeline.errors import ConfigError, ModelError

_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")  # as configurations name their number


def keep_layers(
    model: transformers.PreTrainedModel,
    chosen: Sequence[int] | None,
    decoder_chosen: Sequence[int] | None,
    name: str,
) -> None:
    """Replace the model's lists of layers by copies of the chosen ones, counted from 0.

    Args:
        chosen: of the only stack, or of the encoder; None for all.
        decoder_chosen: of the decoder of a model that has an encoder too; None for all.

    Raises:
        ConfigError: a layer does not exist.
        ModelError: the model keeps its layers in another way.
    """
    config = model.config
    stacks: list[tuple[str, nn.Module, str, Sequence[int] | None]]
    if config.is_encoder_decoder:
        decoder_size = next((n for n in _DECODER_LAYERS if hasattr(config, n)), "num_hidden_layers")
        stacks = [
            ("layers", model.get_encoder(), "num_hidden_layers", chosen),
            ("decoder_layers", model.get_decoder(), decoder_size, decoder_chosen),
        ]
    elif decoder_chosen is not None:
        raise ConfigError(f"student.decoder_layers: {name} has no encoder beside them; use layers")
    else:
        stacks = [("layers", model, "num_hidden_layers", chosen)]
    totals = [getattr(config, size) for _, _, size, _ in stacks]
    for (setting, stack, size, kept), total in zip(stacks, totals, strict=True):
        if kept is not None:
            _check(kept, total, f"student.{setting}: {name}")
            _keep(stack, kept, total)
            setattr(config, size, len(kept))
            _pick_settings(config, kept, total)


def _check(chosen: Sequence[int], total: int, subject: str) -> None:
    for layer in chosen:
        if not 0 <= layer < total:
            raise ConfigError(f"{subject} has no layer {layer}; it has 0 to {total - 1}")


def _keep(stack: nn.Module, chosen: Sequence[int], total: int) -> None:
    owner, attribute, layers = _layer_list(stack, total)
    kept = nn.ModuleList(copy.deepcopy(layers[index]) for index in chosen)
    for position, copied in enumerate(kept):
        for module in copied.modules():
            if hasattr(module, "layer_idx"):  # where the key-value cache of this layer stands
                setattr(module, "layer_idx", position)  # noqa: B010  (not an attribute of nn.Module)
    _carry_position_bias(layers[0], kept)
    setattr(owner, attribute, kept)


def _carry_position_bias(first: nn.Module, kept: nn.ModuleList) -> None:
    """T5's first layer holds the position bias that all the others use."""
    held = next((m for m in first.modules() if getattr(m, "relative_attention_bias", None)), None)
    if held is None:
        return
    for position, layer in enumerate(kept):
        attention: Any = next(m for m in layer.modules() if type(m) is type(held))
        attention.has_relative_attention_bias = position == 0
        if position == 0:
            attention.relative_attention_bias = copy.deepcopy(held.relative_attention_bias)
        elif hasattr(attention, "relative_attention_bias"):
            del attention.relative_attention_bias


def _pick_settings(config: Any, chosen: Sequence[int], total: int) -> None:
    for per_layer in ("layer_types", "sliding_window_pattern"):
        values = getattr(config, per_layer, None)
        if isinstance(values, list) and len(values) == total:
            setattr(config, per_layer, [values[index] for index in chosen])


def _layer_list(model: nn.Module, total: int) -> tuple[nn.Module, str, nn.ModuleList]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                return owner, name, child
    raise ModelError(f"{type(model).__name__}: has no list of {total} layers that could be pruned")
