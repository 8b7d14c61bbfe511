"""Token ids of a text, of a prompt with its completion, of a chat; which of them are learned."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pipeline.errors import DataError

_ROWS_AT_ONCE = 64  # fast tokenizers are several times faster on lists


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any
) -> Iterator[tuple[Mapping[str, Any], np.ndarray, np.ndarray]]:
    """Rows with their token ids and a mask of the learned ones."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, _ROWS_AT_ONCE)):
        if all(row.get("text") is not None for row in chunk):
            encoded = tokenizer([row["text"] for row in chunk], return_attention_mask=False)
            for row, ids in zip(chunk, encoded["input_ids"], strict=True):
                whole = _framed(ids, tokenizer)
                yield row, whole, np.ones(len(whole), dtype=bool)
        else:
            for row in chunk:
                yield row, *_prompted(row, tokenizer)


def _framed(ids: Sequence[int], tokenizer: Any) -> np.ndarray:
    ids = list(ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if eos is not None and (ids[-1:] != [eos] or len(ids) == 1):
        ids = [*ids, eos]
    return np.array(ids, dtype=np.int32)


def _prompted(row: Mapping[str, Any], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    if row.get("messages") is not None:
        return _chat(row, tokenizer)
    if row.get("prompt") is None or row.get("completion") is None:
        raise DataError(
            f"example {row['id']}: has neither text, nor prompt and completion, nor messages;"
            " map the data's columns to these under data.columns"
        )
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and prompt[-1:] == [tokenizer.eos_token_id]:
        prompt = prompt[:-1]  # the prompt is continued, not ended
    ids = _framed([*prompt, *completion], tokenizer)
    learned = np.zeros(len(ids), dtype=bool)
    ended = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    learned[len(ids) - len(completion) - int(ended) :] = True
    return ids, learned


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> np.ndarray:
    """Token ids of a prompt, or of a chat up to where the assistant answers."""
    if row.get("messages") is not None:
        asked = _asked(row["messages"])
        return np.array(template_ids(asked, tokenizer, add_generation_prompt=True), dtype=np.int32)
    ids, learned = _prompted({**row, "completion": ""}, tokenizer)
    prompt: np.ndarray = ids[~learned]
    return prompt


def answer_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with what the teacher wrote in place of what the data say, where it wrote."""
    written = row.get("generated")
    if written is None:
        return row
    if row.get("messages") is None:
        return {**row, "text": None, "completion": written}
    answer = {"role": "assistant", "content": written}
    return {**row, "text": None, "messages": [*_asked(row["messages"]), answer]}


def _asked(messages: Sequence[Any]) -> list[Any]:
    """A chat without the answer that it ends with."""
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def _chat(row: Mapping[str, Any], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Apply the chat template; the assistant's turns are learned, everything else is prompt."""
    messages = row["messages"]
    if not tokenizer.chat_template:
        raise DataError(
            f"example {row['id']}: is a chat, but the tokenizer has no chat template;"
            " use a chat model's tokenizer or map data.columns to text"
        )
    ids = template_ids(messages, tokenizer)
    learned = np.zeros(len(ids), dtype=bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template_ids(messages[:turn], tokenizer, add_generation_prompt=True)
        after = template_ids(messages[: turn + 1], tokenizer)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"example {row['id']}: the chat template does not keep earlier turns unchanged, so"
                f" the tokens of turn {turn} cannot be told apart; split the chat into one row per"
                " answer"
            )
        learned[len(before) : len(after)] = True
    return np.array(ids, dtype=np.int32), learned


def template_ids(messages: Sequence[Any], tokenizer: Any, **options: Any) -> list[int]:
    """Token ids of a chat by the tokenizer's template."""
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    )
