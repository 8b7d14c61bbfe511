"""What servers with OpenAI's interface answered, one response on a line: vLLM, SGLang, OpenAI.

    response   prompt_logprobs     [None, {"7": {"logprob": -0.1, ...}, ...}, ...]   of each token
               choices[]           logprobs.content[].top_logprobs                   of a chat
                                   logprobs.top_logprobs                             of a text
    vLLM offline: prompt_token_ids, prompt_logprobs, outputs[].token_ids and .logprobs

An entry of a token is the distribution that this very token was drawn from, so it belongs to the
position before it. Ids come from `prompt_token_ids`, `token_ids` and "token_id:7"; where a server
gives texts, from the one token that the tokenizer spells so. Formats: vllm-project/vllm,
vllm/logprobs.py and vllm/entrypoints; OpenAI's reference of chat completions.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.exchange.containers import Row, matrix, plain
from pipeline.exchange.dump import ABSENT, Dump, Record, next_tokens, read_chat
from pipeline.exchange.plain import Ragged

OWN_TOKEN = (
    "classes of the tail may be more probable than the least entry, where that is the token that"
    " followed and was added to the most probable ones"
)
_MARK = "token_id:"

Candidates = Mapping[Any, Any]  # token -> log-probability, or an object with one
Step = tuple[int, Candidates | None]  # a token, and what it was drawn from


class Responses(Dump):
    """Responses with log-probabilities of the prompt, of what was written, or of both.

    Attributes:
        response_field: where in a row the response is, response.body in files of OpenAI's
            batches; the row itself where left out.
        messages_field, prompt_field: where in a row the question is, for responses that do not
            repeat its ids: a chat, or a text or ids.
    """

    open_questions: ClassVar = (
        "whether the server changed the logits before it took their logarithms (logprobs_mode,"
        " biases, penalties)",
        OWN_TOKEN,
    )

    name: Literal["openai", "vllm"] = "vllm"
    response_field: str | None = None
    messages_field: str = "messages"
    prompt_field: str = "prompt"

    def records(self, row: Row, tokenizer: Any) -> Iterator[Record]:
        """See `Dump.records`; one for each choice."""
        question = {name: plain(value) for name, value in row.items()}
        response: Any = question
        for part in self.response_field.split(".") if self.response_field else ():
            response = response[part]
        speller = _speller_of(tokenizer)
        choices = response.get("choices") or response.get("outputs") or [{}]
        for choice in choices:
            said = {**response, **{k: v for k, v in choice.items() if v is not None}}
            written, unnamed = _read_written(said, speller)
            if written and written[0][1] is None:  # echoed: the prompt is in it
                prompt: list[Step] = []
            else:
                prompt = self._read_prompt(question, said, tokenizer)
            yield make_record([*prompt, *written], unnamed)

    def _read_prompt(self, question: Row, said: Row, tokenizer: Any) -> list[Step]:
        ids = said.get("prompt_token_ids")
        if ids is None:
            ids = self._ask(question, tokenizer)
        lists = said.get("prompt_logprobs") or [None] * len(ids)
        if len(lists) != len(ids):
            raise DataError(
                f"prompt_logprobs of {len(lists)} tokens, but the prompt has {len(ids)}; ask the"
                " server for return_token_ids"
            )
        steps = [(int(token), _by_id(found)) for token, found in zip(ids, lists, strict=True)]
        for place, (token, found) in enumerate(steps):
            if found is not None and token not in found:
                raise DataError(
                    f"prompt_logprobs of token {place} do not hold its id {token:,}, which servers"
                    " always add: they belong to another prompt"
                )
        return steps

    def _ask(self, question: Row, tokenizer: Any) -> Sequence[int]:
        if question.get(self.messages_field) is not None:
            found = read_chat(question[self.messages_field], tokenizer, add_generation_prompt=True)
            return [int(token) for token in found]
        asked = question.get(self.prompt_field)
        if asked is None:
            raise DataError(
                "holds neither prompt_token_ids nor the prompt; ask the server for"
                f" return_token_ids, or put {self.prompt_field!r} or {self.messages_field!r} beside"
                " the response"
            )
        ids: Sequence[int] = tokenizer(asked)["input_ids"] if isinstance(asked, str) else asked
        return ids


class Speller:
    """Token texts to ids, by what a tokenizer spells."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def find(self, text: str) -> int:
        """The id of a token's text, -1 where none or several tokens are spelt so."""
        if text.startswith(_MARK):
            return int(text.removeprefix(_MARK))
        return self._ids.get(text, -1)

    @cached_property
    def _ids(self) -> dict[str, int]:
        count = max(self._tokenizer.get_vocab().values()) + 1
        texts = self._tokenizer.batch_decode(
            [[token] for token in range(count)], clean_up_tokenization_spaces=False
        )
        ids: dict[str, int] = {}
        for token, text in enumerate(texts):
            ids[text] = -1 if text in ids or "\ufffd" in text else token
        return ids


_speller_of = lru_cache(maxsize=1)(Speller)


def _read_written(said: Row, speller: Speller) -> tuple[list[Step], int]:
    """What the server wrote, with how many candidates had no id."""
    logprobs = said.get("logprobs")
    if logprobs is None:
        return [], 0
    if isinstance(logprobs, list):  # of vLLM, offline
        pairs = zip(said["token_ids"], logprobs, strict=True)
        return [(int(token), _by_id(found)) for token, found in pairs], 0
    texts, lists = _read_texts(logprobs)
    tokens = said.get("token_ids")
    if said.get("prompt_token_ids") and len(texts) > len(tokens or texts):  # echoed
        tokens = [*said["prompt_token_ids"], *(tokens or [])]
    if tokens is None:
        tokens = [speller.find(text) for text in texts]
    if len(tokens) != len(texts):
        raise DataError(f"log-probabilities of {len(texts)} tokens, but {len(tokens)} token_ids")
    steps: list[Step] = []
    unnamed = 0
    for token, text, found in zip(tokens, texts, lists, strict=True):
        if token < 0:
            raise DataError(
                f"token {text!r} is not one token of the tokenizer; ask the server for"
                " return_token_ids or return_tokens_as_token_ids"
            )
        # Of two tokens with one text the last entry, which is that of the token itself, counts.
        named = {int(token) if t == text else speller.find(t): p for t, p in found or ()}
        unnamed += len({t for t, _ in found or () if t != text and speller.find(t) < 0})
        named.pop(-1, None)
        steps.append((int(token), None if found is None else named))
    return steps, unnamed


def _read_texts(logprobs: Any) -> tuple[list[str], list[list[tuple[str, float]] | None]]:
    """Token texts, and for each its candidates; it is one of them."""
    if logprobs.get("content") is not None:
        content = logprobs["content"]
        lists: Any = [
            [(e["token"], e["logprob"]) for e in [*(step.get("top_logprobs") or []), step]]
            for step in content
        ]
        return [step["token"] for step in content], lists
    texts, own = logprobs["tokens"], logprobs["token_logprobs"]
    tops = logprobs.get("top_logprobs") or [{} for _ in texts]
    lists = [
        None if value is None else [*(top or {}).items(), (text, value)]
        for text, value, top in zip(texts, own, tops, strict=True)
    ]
    return texts, lists


def _by_id(found: Candidates | None) -> Candidates | None:
    """vLLM's own: id -> log-probability, or an object that has it."""
    if not found:
        return None
    values = {int(token): value for token, value in found.items() if value is not None}
    return {t: v["logprob"] if isinstance(v, Mapping) else v for t, v in values.items()}


def make_record(steps: Sequence[Step], unnamed: int = 0) -> Record:
    """The record of a text of which each token comes with what it was drawn from, or nothing."""
    input_ids = np.array([token for token, _ in steps], dtype=np.int64)
    known = [
        place
        for place, (_, found) in enumerate(steps)
        if place and found and any(not value <= ABSENT for value in found.values())
    ]
    lists = [steps[place][1] or {} for place in known]
    positions = np.array(known, dtype=np.int64) - 1
    lengths = np.array([len(input_ids)])
    ids: Ragged = matrix([list(found) for found in lists], np.int64)
    log_probs = matrix([list(found.values()) for found in lists], float)
    labels = next_tokens(input_ids, lengths, positions)
    return Record(None, input_ids, lengths, positions, labels, ids, log_probs, unnamed=unnamed)
