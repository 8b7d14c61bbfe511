"""A teacher by content: all that decides its numbers, nothing of where it lies or how it is run.

model -> describe_model -> digests of its weights, its settings, code that came with it
      -> read_settings -> the settings themselves, to name one that differs
"""

import inspect
import sys
from typing import Any

from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from pipeline.identity import digest_json, digest_weights
from pipeline.sentences import HEAD

# Settings that change no number: a name, who wrote the file and when, and what is told of otherwise
# (`dtype`, `architecture`). How attention is computed is no setting of a saved model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")


def describe_model(model: Any) -> dict[str, Any]:
    """What a model is by content, JSON values.

    Returns:
        digest: of its weights; config: of its settings; architecture, dtype, parameters; code: of
        what came with the model, where anything did; head: how a sentence encoder pools.
    """
    described = {
        "digest": digest_weights(model),
        "config": digest_json(read_settings(model)),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if code := _read_code(model):
        described["code"] = digest_json(code)
    head = getattr(model, HEAD, None)
    if head is not None:
        described["head"] = {
            "pooling": head.pooling,
            "activation": head.activation,
            "normalise": head.normalise,
        }
    return described


def read_settings(model: Any) -> dict[str, Any]:
    """The settings of a model that may change a number, those of config.json."""
    return {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}


def describe_writing(model: Any) -> dict[str, Any]:
    """How a model writes texts where a task leaves it to the model: generation_config.json."""
    settings = model.generation_config.to_dict() if model.can_generate() else {}
    return {k: v for k, v in settings.items() if k not in ("transformers_version", "use_cache")}


def _read_code(model: Any) -> dict[str, str]:
    """Source of the modules of Python that came with the model (`trust_remote_code`)."""
    names = {type(module).__module__ for module in model.modules()}
    own = sorted(name for name in names if name.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME)
    return {name.rpartition(".")[2]: inspect.getsource(sys.modules[name]) for name in own}
