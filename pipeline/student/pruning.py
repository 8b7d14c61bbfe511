"""A pruned model: the same embeddings and head over copies of some of its layers."""

import copy
from collections.abc import Sequence

import transformers
from torch import nn

from pipeline.errors import ConfigError, ModelError


def keep_layers(model: transformers.PreTrainedModel, chosen: Sequence[int], name: str) -> None:
    """Replace the model's list of layers by copies of the chosen ones, counted from 0.

    Raises:
        ConfigError: a layer does not exist.
        ModelError: the model keeps its layers in another way.
    """
    total = model.config.num_hidden_layers
    for layer in chosen:
        if not 0 <= layer < total:
            raise ConfigError(
                f"student.layers: {name} has no layer {layer}; it has 0 to {total - 1}"
            )
    owner, attribute, layers = _layer_list(model, total)
    kept = nn.ModuleList(copy.deepcopy(layers[index]) for index in chosen)
    for position, copied in enumerate(kept):
        for module in copied.modules():
            if hasattr(module, "layer_idx"):  # where the key-value cache of this layer stands
                setattr(module, "layer_idx", position)  # noqa: B010  (not an attribute of nn.Module)
    setattr(owner, attribute, kept)
    model.config.num_hidden_layers = len(kept)
    for per_layer in ("layer_types", "sliding_window_pattern"):
        values = getattr(model.config, per_layer, None)
        if isinstance(values, list) and len(values) == total:
            setattr(model.config, per_layer, [values[index] for index in chosen])


def _layer_list(model: nn.Module, total: int) -> tuple[nn.Module, str, nn.ModuleList]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                return owner, name, child
    raise ModelError(f"{type(model).__name__}: has no list of {total} layers that could be pruned")
