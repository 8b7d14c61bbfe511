"""Token ids of what a model reads and of what it says, in the languages of its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, did_you_mean


def encode_texts(
    texts: list[str], tokenizer: Any, limit: int | None, target: bool = False
) -> list[np.ndarray]:
    """Token ids of texts, each ended where the tokenizer has an end mark; cut on the right.

    Args:
        limit: tokens at most, special ones included.
        target: tokenize as what a model says, not what it reads.
    """
    texts_of = {"text_target" if target else "text": texts}
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        encoded = tokenizer(**texts_of, truncation=limit is not None, max_length=limit)
    finally:
        tokenizer.truncation_side = side
    return [_ended(ids, tokenizer.eos_token_id, limit) for ids in encoded["input_ids"]]


def _ended(ids: list[int], eos: int | None, limit: int | None) -> np.ndarray:
    """With an end mark where the tokenizer has one and sets none itself."""
    if eos is not None and eos not in ids:
        ids = [*ids[: None if limit is None else limit - 1], eos]
    return np.array(ids, dtype=np.int32)


@contextmanager
def speaking(tokenizer: Any, source: str | None, target: str | None) -> Iterator[None]:
    """Let a multilingual tokenizer read one language and write another; it is left as it was.

    Raises:
        ConfigError: the tokenizer knows no languages, or not this one.
    """
    wanted = {"src_lang": source, "tgt_lang": target}
    chosen = {name: language for name, language in wanted.items() if language is not None}
    for language in chosen.values():
        _require_language(tokenizer, language)
    before = {name: getattr(tokenizer, name) for name in chosen}
    try:
        for name, language in chosen.items():
            setattr(tokenizer, name, language)
        yield
    finally:
        for name, language in before.items():
            setattr(tokenizer, name, language)


def _require_language(tokenizer: Any, language: str) -> None:
    name = type(tokenizer).__name__
    if not hasattr(tokenizer, "src_lang"):
        raise ConfigError(
            f"task: language {language!r} is given, but the tokenizer ({name}) knows no languages;"
            " leave it out"
        )
    codes = getattr(tokenizer, "lang_code_to_token", None) or tokenizer.get_vocab()
    if language not in codes:
        raise ConfigError(
            f"task: the tokenizer ({name}) does not know the language {language!r}"
            f"{did_you_mean(language, codes)}"
        )
