"""Digests by content: the same thing has the same digest in every process, under every name.

tokenizer, weights, examples, any JSON value -> blake2b or sha256, in hexadecimal
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import canonical_json
from pipeline.errors import ModelError
from pipeline.examples import Example

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python: its class stands for its rules
        model: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        model = json.loads(backend.to_str())
        model.pop("truncation", None)
        model.pop("padding", None)
    special = {name: _text(getattr(tokenizer, name, None)) for name in _SPECIAL_TOKENS}
    added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    return digest_json(
        {
            "model": model,
            "special": special,
            "added": added,
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
    )


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
        arrays = {
            "input_ids": example.input_ids,
            "segment_lengths": example.segment_lengths,
            "target_positions": example.target_positions,
            "label_ids": example.label_ids,
        }
        lengths = {name: len(array) for name, array in arrays.items()}
        columns: Mapping[str, Any] = dict(example.columns)
        header = canonical_json([example.example_id, lengths, columns]).encode()
        self._digest.update(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            self._digest.update(array.astype("<i4").tobytes())

    def hexdigest(self) -> str:
        """The digest of what was taken in so far."""
        return self._digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
