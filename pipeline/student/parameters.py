"""A model's parameters by name: which a pattern means, and how deep below the head each lies."""

import fnmatch
import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from pipeline.errors import ConfigError, ModelError

# The outermost numbered list: layers.3. (Llama), layer.3. (BERT), h.3. (GPT-2), block.3. (T5).
_LAYER = re.compile(r"(.*?(?:^|[._])(?:layers?|h|blocks?))\.(\d+)\.")


def match_parameters(names: Iterable[str], pattern: str, setting: str) -> list[str]:
    """The parameters whose names match a pattern (`*` and `?`).

    Args:
        setting: where the pattern was given, for the error.

    Raises:
        ConfigError: there is none (with the nearest name).
    """
    names = list(names)
    matched = fnmatch.filter(names, pattern)
    if not matched:
        raise ConfigError(
            f"{setting} {pattern!r} matches no parameter{_near_names(pattern, names)}"
        )
    return matched


def levels_below_head(model: nn.Module) -> dict[str, int]:
    """How many layers down each parameter lies: 0 for the head and whatever stands above the
    layers, 1 for the last of L layers, L for the first, L + 1 for embeddings.

    Encoder and decoder each count from their own last layer. An output head that is tied to the
    embeddings lies with them.

    Raises:
        ModelError: the model has layers, but none that is known by its name.
    """
    found = {name: _LAYER.match(name) for name, _ in model.named_parameters()}
    depths: dict[str, int] = {}  # of each list of layers
    for match in found.values():
        if match:
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    if not depths and getattr(getattr(model, "config", None), "num_hidden_layers", None):
        raise ModelError(
            f"{type(model).__name__}: names no layer as layers.0, layer.0, h.0 or block.0, so none"
            " is above another; leave out learning_rates.layer_decay and freeze.gradual"
        )
    embeddings = _embeddings(model)
    below = max(depths.values(), default=0) + 1
    return {
        name: depths[match[1]] - int(match[2]) if match else below * (name in embeddings)
        for name, match in found.items()
    }


def _embeddings(model: nn.Module) -> set[str]:
    """The parameters of embedding tables, and of modules called so (their norm, their width)."""
    tables = {
        f"{path}.weight" for path, module in model.named_modules() if type(module) is nn.Embedding
    }
    return {n for n, _ in model.named_parameters() if n in tables or "embed" in n.lower()}


def _near_names(pattern: str, parameters: Iterable[str]) -> str:
    """A hint of the nearest module or parameter, else of the outermost modules."""
    paths = [name.split(".") for name in parameters]
    names = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
    near = get_close_matches(pattern.rstrip(".*?"), sorted(names), n=1)
    if near:
        return f"; did you mean '{near[0]}*'?"
    return f"; choose from {', '.join(sorted({'.'.join(path[:2]) + '*' for path in paths}))}"
