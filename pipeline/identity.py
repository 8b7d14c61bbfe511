"""Digests by content: the same thing has the same digest in every process, under every name.

tokenizer, weights, examples, any JSON value -> blake2b or sha256, in hexadecimal
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import canonical_json
from pipeline.errors import ModelError
from pipeline.examples import Example

CONTENT_BYTES = 16  # of `digest_example`
_ARRAYS = ("input_ids", "segment_lengths", "target_positions", "label_ids")
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Of tokenizer_config.json: where a tokenizer lies, and what only decides how ids are put together.
_UNREAD_SETTINGS = (
    "name_or_path",
    "tokenizer_class",
    "auto_map",
    "processor_class",
    "is_local",
    "local_files_only",
    "backend",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)


def digest_json(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys."""
    return _blake2b(canonical_json(value).encode())


def make_generator(*parts: object) -> np.random.Generator:
    """Random numbers that depend on what they are for (a seed, an id, ...) and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def digest_tokenizer(tokenizer: Any) -> str:
    """Digest of all that decides which ids a text becomes.

    Vocabulary, merges, added and special tokens, normaliser, pre-tokeniser, post-processor and
    chat template; not its name, its files, or what truncation and padding are set to just now.

    Args:
        tokenizer: a transformers tokenizer.
    """
    return digest_json(_describe_tokenizer(tokenizer))


def digest_tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """The digest of each part of a tokenizer, to tell in which of them two differ."""
    described = _describe_tokenizer(tokenizer)
    rules = described.pop("model")
    model = rules.pop("model", {})  # the vocabulary of a fast one, its merges and how it cuts
    parts = described | rules | (model if isinstance(model, Mapping) else {})
    return {name: digest_json(part) for name, part in parts.items()}


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model = _describe_python(tokenizer)
    else:
        model = json.loads(backend.to_str())
        model.pop("truncation", None)
        model.pop("padding", None)
    return {
        "model": model,
        "special": {name: _text(getattr(tokenizer, name, None)) for name in _SPECIAL_TOKENS},
        "added": {str(index): str(t) for index, t in tokenizer.added_tokens_decoder.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }


def _describe_python(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer in Python: its class stands for its rules, what it saves for all that they read,
    as merges, the model of sentencepiece and settings (lower case, dropout, ...)."""
    found: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
    }
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content: Any = _blake2b(file.read_bytes())
            if file.name == "tokenizer_config.json":
                settings = json.loads(file.read_text(encoding="utf-8"))
                content = {
                    name: value
                    for name, value in settings.items()
                    if name not in _UNREAD_SETTINGS and value is not None
                }
            found[file.relative_to(folder).as_posix()] = content
    return found


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's weights, in order of the names.

    One tensor at a time visits the CPU.

    Raises:
        ModelError: a weight was offloaded and is not in memory.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ModelError(
                f"{type(model).__name__}: weight {name} is offloaded; choose a teacher.device_map"
                " that keeps all weights in memory"
            )
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(canonical_json(header).encode())
        _update(digest, tensor)
    return digest.hexdigest()


class ExamplesDigest:
    """Digest of examples in their order: ids, tokens, documents, targets, labels and columns."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=32)

    def add(self, example: Example) -> None:
        """Take the next example in."""
        self._digest.update(_spell(example, example.columns))

    def hexdigest(self) -> str:
        """The digest of what was taken in so far."""
        return self._digest.hexdigest()


def digest_example(example: Example) -> bytes:
    """The content of one example in 16 bytes: its id, tokens, documents, targets, labels, columns.

    A column without a value is as one that is not there.
    """
    known = {name: value for name, value in example.columns.items() if value is not None}
    return hashlib.blake2b(_spell(example, known), digest_size=CONTENT_BYTES).digest()


def _spell(example: Example, columns: Mapping[str, Any]) -> bytes:
    """One sequence of bytes for one example, whose end can be told from what follows."""
    arrays = {name: getattr(example, name) for name in _ARRAYS}
    lengths = {name: len(array) for name, array in arrays.items()}
    header = canonical_json([example.example_id, lengths, dict(columns)]).encode()
    numbers = b"".join(array.astype("<i4").tobytes() for array in arrays.values())
    return len(header).to_bytes(8, "little") + header + numbers


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
