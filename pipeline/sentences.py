"""What turns a transformer into a sentence encoder, in the files of sentence-transformers.

    last hidden states [B, T, D] -> pooling -> (dense layer) -> (length 1) -> sentence vectors

A folder holds the transformer itself and, beside it, modules.json with one folder for each module
after it (1_Pooling, 2_Dense, 3_Normalize), as sentence-transformers writes and reads them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import cached_file

from pipeline.errors import ModelError

Pooling = Literal["mean", "cls"]
HEAD = "sentence_head"  # the attribute of a model that holds its head

_MODULES = "modules.json"
_FOLDER = re.compile(r"\w[\w.-]*")  # a name of strangers: not a path that leads elsewhere
_PREFIX = "sentence_transformers.models."
_MODES: dict[str, Pooling] = {  # by their names, older and later
    "mean_tokens": "mean",
    "cls_token": "cls",
    "mean": "mean",
    "cls": "cls",
}
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh}


class SentenceHead(nn.Module):
    """The modules after the transformer.

    Attributes:
        pooling: of the hidden states: their mean over the tokens, or that of the first token.
        dense: from the transformer's width to another one; None where the width stays.
        activation: of the dense layer.
        normalise: whether vectors have length 1.
    """

    def __init__(
        self,
        pooling: Pooling = "mean",
        dense: nn.Linear | None = None,
        activation: str = "Identity",
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.dense = dense
        self.activation = activation
        self.normalise = normalise

    def forward(self, pooled: Tensor) -> Tensor:
        """Sentence vectors [B, D'] of pooled states [B, D], in float32 at least."""
        if self.dense is not None:
            pooled = _ACTIVATIONS[self.activation]()(self.dense(pooled.to(self.dense.weight.dtype)))
        pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        return functional.normalize(pooled, dim=1) if self.normalise else pooled

    @classmethod
    def read(cls, name: str, revision: str | None = None) -> "SentenceHead":
        """The head that a folder or a model of the hub has; the mean alone where it says nothing.

        Raises:
            ModelError: a module that is not known here, or damaged files.
        """
        found = _find(name, _MODULES, revision)
        if found is None:
            return cls()
        head = cls()
        try:
            modules = json.loads(found.read_text(encoding="utf-8"))
            named = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules[1:]]
        except (ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{name}: its {_MODULES} is damaged; copy the model again") from error
        for kind, path in named:
            if kind not in _READERS or not _FOLDER.fullmatch(path):
                raise ModelError(
                    f"{name}: has a module {kind} in {path!r} after its transformer; expected"
                    f" {', '.join(_READERS)}, each in a folder of the model's own"
                )
            _READERS[kind](head, name, path, revision)
        return head

    def save(self, folder: Path, width: int, max_length: int | None = None) -> None:
        """Write the modules beside a transformer.

        Args:
            width: D of the transformer.
            max_length: tokens that are read; left to the tokenizer where None.
        """
        paths = ["", *self._write(folder, width)]
        kinds = ["Transformer", *(path.partition("_")[2] for path in paths[1:])]
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": _PREFIX + kind}
            for index, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ]
        _write_json(folder / _MODULES, modules)
        if max_length is not None:
            settings = {"max_seq_length": max_length, "do_lower_case": False}
            _write_json(folder / "sentence_bert_config.json", settings)

    def _write(self, folder: Path, width: int) -> Iterator[str]:
        """Write each module into a folder of its own, and give its name."""
        path = "1_Pooling"
        modes = {
            f"pooling_mode_{mode}": _MODES[mode] == self.pooling
            for mode in ("cls_token", "mean_tokens")
        }
        _write_json(folder / path / "config.json", {"word_embedding_dimension": width, **modes})
        yield path
        if self.dense is not None:
            path = "2_Dense"
            settings = {
                "in_features": self.dense.in_features,
                "out_features": self.dense.out_features,
                "bias": self.dense.bias is not None,
                "activation_function": f"torch.nn.modules.{_torch_module(self.activation)}",
            }
            _write_json(folder / path / "config.json", settings)
            weights = {f"linear.{name}": w for name, w in self.dense.state_dict().items()}
            save_file(weights, folder / path / "model.safetensors")
            yield path
        if self.normalise:
            path = f"{3 if self.dense is not None else 2}_Normalize"
            (folder / path).mkdir(exist_ok=True)
            yield path


def head_of(model: Any) -> SentenceHead | None:
    """The head that a model was given; None for one that is no sentence encoder."""
    head = getattr(model, HEAD, None)
    assert head is None or isinstance(head, SentenceHead)
    return head


def pooled_width(model: Any) -> int:
    """D of a model's pooled vectors: that of its dense layer, else of its hidden states."""
    head = head_of(model)
    if head is not None and head.dense is not None:
        return int(head.dense.out_features)
    return int(getattr(model.config.get_text_config(), "hidden_size", 0))


def _read_pooling(head: SentenceHead, name: str, path: str, revision: str | None) -> None:
    settings = _read_settings(name, path, revision)
    found = [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True]
    found = [mode for mode in found if mode != "include_prompt"]
    if "pooling_mode" in settings:  # as later versions write it
        found = [settings["pooling_mode"]]
    if len(found) != 1 or found[0] not in _MODES:
        raise ModelError(
            f"{name}: pools by {', '.join(map(str, found)) or 'nothing'}; expected the mean of the"
            " tokens or the first token alone"
        )
    head.pooling = _MODES[found[0]]


def _read_dense(head: SentenceHead, name: str, path: str, revision: str | None) -> None:
    settings = _read_settings(name, path, revision)
    activation = str(settings.get("activation_function", "Tanh")).rpartition(".")[2]
    known = activation in _ACTIVATIONS and not settings.get("use_residual")
    if head.dense is not None or not known:
        raise ModelError(
            f"{name}: its {path} cannot be used (activation {activation}); expected one dense"
            f" layer with {' or '.join(_ACTIVATIONS)} and without a residual"
        )
    file = _find(name, f"{path}/model.safetensors", revision)
    if file is None:
        raise ModelError(f"{name}: has no {path}/model.safetensors; save the model again with it")
    weights = {key.removeprefix("linear."): value for key, value in load_file(file).items()}
    sizes = weights["weight"].shape
    head.dense = nn.Linear(sizes[1], sizes[0], bias="bias" in weights)
    head.dense.load_state_dict(weights)
    head.activation = activation


def _read_normalize(head: SentenceHead, name: str, path: str, revision: str | None) -> None:
    head.normalise = True


_READERS = {"Pooling": _read_pooling, "Dense": _read_dense, "Normalize": _read_normalize}


def _read_settings(name: str, path: str, revision: str | None) -> Mapping[str, Any]:
    file = _find(name, f"{path}/config.json", revision)
    if file is None:
        raise ModelError(f"{name}: modules.json names {path}, which has no config.json")
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def _find(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a local folder or of the hub; None where there is none."""
    if Path(name).expanduser().is_dir():
        path = Path(name).expanduser() / file
        return path if path.is_file() else None
    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _torch_module(activation: str) -> str:
    return f"{'linear' if activation == 'Identity' else 'activation'}.{activation}"


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
