"""Texts and pairs of texts as token ids, for the tasks that read whole texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import DataError

ROWS_AT_ONCE = 256  # fast tokenizers are several times faster on lists
_NO_LIMIT = 10**9  # transformers gives a tokenizer without a limit an astronomic one


def tokenize_texts(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and segment lengths (one per text) of each row, cut on the right.

    Args:
        rows: with `id`, `text` and maybe `text_pair`.
        max_length: tokens, special ones included; what the tokenizer's model reads where None.

    Raises:
        DataError: no text, no token, or more than the model reads.
    """
    texts, pairs = _column(rows, "text"), None
    if rows[0].get("text_pair") is not None:
        pairs = _column(rows, "text_pair")
    limit = max_length
    if limit is None and tokenizer.model_max_length < _NO_LIMIT:
        limit = tokenizer.model_max_length
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        encoded = tokenizer(texts, pairs, truncation=limit is not None, max_length=limit)
    finally:
        tokenizer.truncation_side = side
    ids = [np.array(one, dtype=np.int32) for one in encoded["input_ids"]]
    for row, one in zip(rows, ids, strict=True):
        _check_length(row, one, tokenizer)
    types = encoded.get("token_type_ids") if pairs else None
    return ids, [_segments(one, types[i] if types else None) for i, one in enumerate(ids)]


def _segments(ids: np.ndarray, types: Sequence[int] | None) -> np.ndarray:
    second = int(np.sum(types)) if types is not None else 0
    lengths = [len(ids) - second, second] if second else [len(ids)]
    return np.array(lengths, dtype=np.int32)


def _column(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    for row in rows:
        if not isinstance(row.get(column), str):
            raise DataError(
                f"example {row['id']}: has {row.get(column)!r} as its {column}, expected a text;"
                f" map the right column with data.columns.{column}"
            )
    return [row[column] for row in rows]


def _check_length(row: Mapping[str, Any], ids: np.ndarray, tokenizer: Any) -> None:
    if len(ids) == 0:
        raise DataError(f"example {row['id']}: its text gives no token; leave it out of the data")
    if len(ids) > tokenizer.model_max_length:
        raise DataError(
            f"example {row['id']}: is {len(ids):,} tokens long, the model reads"
            f" {tokenizer.model_max_length:,}; set task.max_length to at most that"
        )
