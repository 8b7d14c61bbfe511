"""A student in int8: a quarter of the bytes, without pickle and without another package.

    W [out, in] -> int8, one scale per output channel    x [..., in] -> int8, one scale per row
    y = (x_int8 · W_int8) * scale_x * scale_W + bias

Symmetric, the weights once, the activations at run time ("dynamic"): Jacob et al. 2018, §2; a scale
per row of activations as in ZeroQuant (Yao et al. 2022). Embeddings are kept one scale per row. The
integer products are summed in float32, which holds them exactly up to 1,040 inputs, so that every
processor gives the same answer; it saves memory, not time.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

import pipeline.student  # noqa: F401  (registers hashed-bag with the Auto classes)
from pipeline.errors import ModelError
from pipeline.safe_loading import NO_CODE

FILE = "int8.safetensors"  # not model.safetensors: transformers would take the integers for weights
_VERSION = "1"
_LARGEST = 127.0
_PROBED = 8  # ids that an unknown kind of embedding is asked for
_TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """A linear map of weights in int8, one scale per output channel.

    Args:
        weight: [out, in] int8; scale: [out, 1] float32; bias: [out] or None.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.scale = scale
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., out] of [..., in], whose rows are rounded to 255 even levels each."""
        levels, scale = _round(hidden.float())
        product = nn.functional.linear(levels, self.weight.float()) * scale * self.scale[:, 0]
        answer = product if self.bias is None else product + self.bias
        return answer.to(hidden.dtype)


class Int8Embedding(nn.Module):
    """Embeddings in int8, one scale per row.

    Args:
        weight: [V, D] int8; scale: [V, 1] float32; factor: on every answer.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale: nn.Parameter, factor: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.scale = scale
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        """[..., D] float32 of ids [...]."""
        return self.weight[ids].float() * (self.scale[ids] * self.factor)


def quantize(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Replace linear maps and embeddings in place; weights that are tied stay tied.

    What is neither (norms, biases, expert tensors, positions with an offset) keeps its precision.

    Args:
        model: in evaluation mode, on the CPU.
        names: the modules to replace, and whatever is tied to them; None for all that can be.

    Returns:
        How many weights are in int8 now, each counted once.
    """
    done: dict[int, tuple[Tensor, Tensor, nn.Parameter]] = {}  # the weights too: ids stay theirs
    for name, module in list(model.named_modules(remove_duplicate=False)):
        factor = _factor_of(module)
        if factor is None:
            continue
        weight: Any = module.weight
        if id(weight) not in done:
            if names is not None and name not in names:
                continue
            plain = weight.detach().float()
            levels, scale = _round(plain.T if isinstance(module, Conv1D) else plain)
            kept = nn.Parameter(scale, requires_grad=False)
            done[id(weight)] = (weight, levels.to(torch.int8), kept)
        parent, _, last = name.rpartition(".")
        new = _replacement(module, *done[id(weight)][1:], factor)
        setattr(model.get_submodule(parent), last, new)
    return sum(weight.numel() for weight, _, _ in done.values())


def save_int8(model: transformers.PreTrainedModel, auto_class: str, folder: Path) -> int:
    """Quantise a model in place, write it and its configuration; return how many weights are int8.

    Args:
        auto_class: the transformers Auto class that opens the model, for instance
            AutoModelForCausalLM.
    """
    count = quantize(model.eval())
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if all(tensor.data_ptr() != kept.data_ptr() for kept in tensors.values()):
            tensors[name] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / FILE, {"version": _VERSION, "auto_class": auto_class})
    return count


def load_int8(name: str | Path) -> transformers.PreTrainedModel:
    """Open a folder, or a name on the hub, that `stillroom export --format int8` wrote.

    Returns:
        The model in evaluation mode on the CPU; it answers as any other of its class.

    Raises:
        ModelError: it holds no int8 student, or one of a newer version or another architecture.
    """
    try:
        file = cached_file(str(name), FILE)
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: holds no int8 student ({first})") from error
    about = about or {}
    if about.get("version") != _VERSION:
        raise ModelError(
            f"{name}: int8 format {about.get('version')}, this Stillroom reads {_VERSION};"
            " export the student again"
        )
    auto_class = about.get("auto_class", "")
    if not auto_class.startswith("AutoModel") or not hasattr(transformers, auto_class):
        raise ModelError(f"{name}: int8 of {auto_class!r}, expected a class AutoModel...")
    config = transformers.AutoConfig.from_pretrained(str(name), **NO_CODE)
    with torch.random.fork_rng(devices=[]):  # weights that are replaced at once
        model = getattr(transformers, auto_class).from_config(config).float().eval()
    quantize(
        model, {k.removesuffix(".weight") for k, t in tensors.items() if t.dtype == torch.int8}
    )
    _fill(model, tensors, str(name))
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(name))
    return model


def _fill(model: transformers.PreTrainedModel, tensors: dict[str, Tensor], name: str) -> None:
    """Copy the tensors in; those that are tied were written once."""
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise ModelError(f"{name}: does not fit its config.json ({first[:200]})") from error
    state = model.state_dict()
    filled = {state[key].data_ptr() for key in tensors if key in state}
    lacking = [key for key in found.missing_keys if state[key].data_ptr() not in filled]
    if lacking or found.unexpected_keys:
        key = (lacking or found.unexpected_keys)[0]
        problem = "lacks" if lacking else "has the unknown"
        raise ModelError(f"{name}: does not fit its config.json ({FILE} {problem} {key})")


@torch.no_grad()
def _factor_of(module: nn.Module) -> float | None:
    """What a module multiplies its rows or products by; None where it cannot be replaced.

    Subclasses of embeddings are asked, not believed: some scale, some shift the ids.
    """
    if type(module) in (nn.Linear, nn.Embedding, Conv1D):
        return 1.0
    if not isinstance(module, nn.Embedding):
        return None
    ids = torch.arange(min(_PROBED, module.num_embeddings))
    try:
        answer, rows = module(ids[None])[0], module.weight[ids]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    factor = float((answer * rows).sum() / rows.square().sum().clamp(min=_TINY))
    return factor if factor and torch.allclose(answer, factor * rows, rtol=1e-4) else None


def _replacement(
    module: nn.Module, levels: Tensor, scale: nn.Parameter, factor: float
) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return Int8Embedding(levels, scale, factor)
    bias: Any = module.bias
    return Int8Linear(levels, scale, bias)


def _round(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-127, 127] and the scale of each row, [..., D] and [..., 1]."""
    scale = (rows.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=_TINY)
    return (rows / scale).round().clamp(-_LARGEST, _LARGEST), scale
