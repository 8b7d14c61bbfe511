"""The query, key and value vectors of a model's self-attention, seen by hooks on its projections.

    model -- find_attention --> [SelfAttention] by layer
    model called inside watch_attention(model, signals) --> signal -> [B, T, heads, width]

Signals are `query.<i>`, `key.<i>` and `value.<i>` with i from 1 to L, as `layer.<i>` is what layer
i returns; negative ones count from the last. Projections are computed by every implementation of
attention (eager, sdpa, flash), so none has to be chosen. What a model does to the vectors
afterwards is not in them: rotary positions, norms of queries and keys.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ConfigError, ModelError

PARTS = ("query", "key", "value")

# Names of the three projections: BERT and its kin, DistilBERT and XLM, Llama and its kin and BART,
# DeBERTa, T5 and MPNet.
_APART = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
# One projection for all: queries, keys and values after one another (GPT-2; Phi-3; ModernBERT and
# MPT), or by group of heads, each with its queries, its key and its value (GPT-NeoX, BLOOM,
# Falcon).
_JOINED = ("c_attn", "qkv_proj", "Wqkv")
_GROUPED = "query_key_value"
_CROSS = {"crossattention", "cross_attn", "encoder_attn", "EncDecAttention"}

Read = Callable[[Tensor], Tensor]  # what a projection returns [..., n] -> one part [..., heads, d]


@dataclass(frozen=True)
class HeadShape:
    """How a vector is made up: `heads` pieces of `width` numbers."""

    heads: int
    width: int

    @property
    def total(self) -> int:
        """Numbers of the vector."""
        return self.heads * self.width


@dataclass(frozen=True)
class Part:
    """Where the queries, the keys or the values of a layer come from."""

    projection: nn.Module
    shape: HeadShape
    read: Read


SelfAttention = dict[str, Part]  # of one layer, by PARTS


def model_depth(config: Any) -> int:
    """How many layers have hidden states that are kept: the decoder's, where there is an encoder
    too; 0 where the config does not say."""
    names = ["num_hidden_layers"]
    if config.is_encoder_decoder:
        names = ["num_decoder_layers", "decoder_layers", *names]
    return int(next((getattr(config, name) for name in names if hasattr(config, name)), 0))


def find_attention(model: Any) -> list[SelfAttention]:
    """The self-attention of every layer, the first one first; of a decoder where there is one.

    Raises:
        ModelError: the projections have names that are not known here, or are shared by layers.
    """
    config = model.config.get_text_config()
    named = [
        (name, module)
        for name, module in model.named_modules()
        if not _CROSS & set(name.split(".")) and _projects(module)
    ]
    inside = [module for name, module in named if "decoder" in name.split(".")]
    modules = [module for _, module in named]
    if model.config.is_encoder_decoder and inside:
        modules = inside
    layers = model_depth(config)
    if not modules or len(modules) != layers:
        raise ModelError(
            f"{type(model).__name__}: the query, key and value projections of its {layers} layers"
            f" are not where they are looked for ({len(modules)} were found); leave out hidden.qkv"
            " and the losses that compare attention"
        )
    return [_take_apart(module, int(config.num_attention_heads)) for module in modules]


def name_attention(model: Any, layers: Sequence[int]) -> dict[str, HeadShape]:
    """Signal names of all three parts of chosen layers, and what their vectors are made of.

    Raises:
        ConfigError: the model has no such layer.
        ModelError: see `find_attention`.
    """
    found: dict[str, HeadShape] = {}
    attention = find_attention(model) if layers else []
    for layer in layers:
        index = _index(layer, len(attention))
        found |= {f"{name}.{index + 1}": part.shape for name, part in attention[index].items()}
    return found


@contextmanager
def watch_attention(model: Any, signals: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect signals of what the model is called with inside, [B, T, heads, width] each.

    Raises:
        ConfigError: the model has no such layer.
        ModelError: see `find_attention`.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    wanted = list(signals)
    attention = find_attention(model) if wanted else []
    for signal in wanted:
        name, _, layer = signal.partition(".")
        part = attention[_index(int(layer), len(attention))][name]
        handles.append(part.projection.register_forward_hook(_keep(seen, signal, part)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict[str, Tensor], signal: str, part: Part) -> Callable[..., None]:
    def hook(_: nn.Module, given: Any, returned: Tensor) -> None:
        seen[signal] = part.read(returned)

    return hook


def _index(layer: int, layers: int) -> int:
    """The place of a layer that is counted from 1, or from the last by -1."""
    index = layer + layers if layer < 0 else layer - 1
    if not 0 <= index < layers:
        raise ConfigError(
            f"attention of layer {layer}: the model has layers 1 to {layers}, or -{layers} to -1"
        )
    return index


def _projects(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return _names(children) is not None or _joined(children) is not None or _GROUPED in children


def _names(children: dict[str, nn.Module]) -> tuple[str, str, str] | None:
    return next((names for names in _APART if all(name in children for name in names)), None)


def _joined(children: dict[str, nn.Module]) -> nn.Module | None:
    """GPT-2's c_attn is a Conv1D; that of others, a Linear, has its numbers in another order."""
    for name in _JOINED:
        child = children.get(name)
        if child is not None and (name != "c_attn" or isinstance(child, Conv1D)):
            return child
    return None


def _take_apart(module: nn.Module, heads: int) -> SelfAttention:
    """The three parts of a self-attention with so many heads of queries."""
    children = dict(module.named_children())
    if names := _names(children):
        width = _outputs(children[names[0]]) // heads
        return {
            part: _apart(children[name], width) for part, name in zip(PARTS, names, strict=True)
        }
    grouped = children.get(_GROUPED)
    projection = _joined(children) if grouped is None else grouped
    assert projection is not None
    outputs = _outputs(projection)
    width = _head_width(module, outputs, heads)
    groups = (outputs // width - heads) // 2
    counts = (heads, groups, groups)
    reads = _slices(counts, width) if grouped is None else _group_slices(heads, groups, width)
    return {
        part: Part(projection, HeadShape(count, width), read)
        for part, count, read in zip(PARTS, counts, reads, strict=True)
    }


def _outputs(projection: nn.Module) -> int:
    """Numbers that a projection returns."""
    return int(getattr(projection, "out_features", None) or projection.nf)  # type: ignore[arg-type]


def _apart(projection: nn.Module, width: int) -> Part:
    shape = HeadShape(_outputs(projection) // width, width)
    return Part(projection, shape, lambda x: _split(x, shape.heads, width))


def _head_width(module: Any, outputs: int, heads: int) -> int:
    """Numbers of a head; where the module does not say, there are as many keys as queries."""
    known = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    return int(known or outputs // (3 * heads))


def _slices(counts: Sequence[int], width: int) -> list[Read]:
    """All queries, then all keys, then all values."""

    def read(start: int, count: int) -> Read:
        return lambda x: _split(x, -1, width)[..., start : start + count, :]

    return [read(sum(counts[:number]), count) for number, count in enumerate(counts)]


def _group_slices(heads: int, groups: int, width: int) -> list[Read]:
    """For each group its queries, a key and a value."""
    queries = heads // groups

    def read(inside: slice) -> Read:
        return lambda x: _split(x, groups, queries + 2, width)[..., inside, :].flatten(-3, -2)

    return [read(slice(queries)), read(slice(queries, queries + 1)), read(slice(queries + 1, None))]


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension in several."""
    return x.reshape(*x.shape[:-1], *sizes)
