"""Axolotl's distillation data: per token a list of candidates, aligned with the end of the text.

    logprobs: [[{"token": "token_id:7", "logprob": -0.1}, ...], ...]                entries
    logprobs: [[-0.1, ...], ...], target_token_ids: [[7, ...], ...]                 arrays
    target_logprobs, target_token_ids, target_mask, input_ids                       prepared

Entries and arrays hold what a server said of the tokens that it wrote: the last list is about the
last token, lists before it about those before, and what has no list is the prompt. Prepared data
have a list for each token, renormalised over its entries; versions of axolotl differ in whether it
is about its own token or the next. Format: axolotl-ai-cloud/axolotl, src/axolotl/integrations/kd.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from pipeline.errors import ConfigError, DataError
from pipeline.exchange.containers import Row, matrix, numbers, plain
from pipeline.exchange.dump import ABSENT, Dump, Record, next_tokens, read_chat, take
from pipeline.exchange.plain import Ragged

_MARK = "token_id:"


class Axolotl(Dump):
    """Rows as axolotl's distillation plugin reads them, or as it leaves them prepared.

    Attributes:
        logprobs_field: the field of the candidates, as axolotl's own setting of that name.
        messages_field: the field of the chat, for rows without `input_ids`: its tokens are those
            of the tokenizer's chat template.
        about: whose distribution a list of prepared data is: that of its own token, or the next.
    """

    open_questions: ClassVar = ("whether the server changed the logits by biases or penalties",)

    name: Literal["axolotl"] = "axolotl"
    logprobs_field: str = "logprobs"
    messages_field: str = "messages"
    about: Literal["own", "next"] | None = None

    def records(self, row: Row, tokenizer: Any) -> Iterator[Record]:
        """See `Dump.records`."""
        if row.get("target_logprobs") is not None:
            yield self._read_prepared(row)
            return
        input_ids = self._read_tokens(row, tokenizer)
        ids, log_probs = self._read_candidates(row)
        first = len(input_ids) - len(ids.lengths)
        if first < 0:
            raise DataError(f"{len(ids.lengths)} lists for {len(input_ids)} tokens")
        yield _make_record(input_ids, np.arange(first, len(input_ids)) - 1, ids, log_probs)

    def _read_tokens(self, row: Row, tokenizer: Any) -> np.ndarray:
        if row.get("input_ids") is not None:
            return numbers(row["input_ids"], np.int64)
        return read_chat(plain(take(row, self.messages_field)), tokenizer)

    def _read_candidates(self, row: Row) -> tuple[Ragged, Ragged]:
        given = take(row, self.logprobs_field)
        if row.get("target_token_ids") is not None:
            return matrix(row["target_token_ids"], np.int64), matrix(given, float)
        lists = [entries or [] for entries in plain(given)]
        ids = [[_read_id(entry["token"]) for entry in entries] for entries in lists]
        log_probs = [[entry["logprob"] for entry in entries] for entries in lists]
        return matrix(ids, np.int64), matrix(log_probs, float)

    def _read_prepared(self, row: Row) -> Record:
        if self.about is None:
            raise ConfigError(
                "format.about is missing: prepared data do not tell whether a list is about its own"
                " token or the next; set it to own or next"
            )
        input_ids = numbers(take(row, "input_ids"), np.int64)
        mask = matrix(take(row, "target_mask"), np.int64)
        ids = matrix(take(row, "target_token_ids"), np.int64)
        log_probs = matrix(row["target_logprobs"], float)
        if len(mask.lengths) != len(input_ids) or not np.array_equal(mask.lengths, ids.lengths):
            raise DataError(
                f"{len(mask.lengths)} lists in target_mask, {len(ids.lengths)} in target_token_ids,"
                f" for {len(input_ids)} tokens; expected one of one length for each"
            )
        held = np.where(mask.values != 0, log_probs.values, -np.inf)
        positions = np.arange(len(input_ids)) - (self.about == "own")
        return _make_record(input_ids, positions, ids, Ragged(held, log_probs.lengths))


def _make_record(
    input_ids: np.ndarray, positions: np.ndarray, ids: Ragged, log_probs: Ragged
) -> Record:
    """The lists that say something, at the positions before the tokens that they are about."""
    said = log_probs.any(~(log_probs.values <= ABSENT))  # nan is something, and refused later
    kept = said & (positions >= 0) & (positions < len(input_ids) - 1)
    lengths = np.array([len(input_ids)])
    labels = next_tokens(input_ids, lengths, positions[kept])
    return Record(
        None, input_ids, lengths, positions[kept], labels, ids.select(kept), log_probs.select(kept)
    )


def _read_id(token: str) -> int:
    if not token.startswith(_MARK):
        raise DataError(f"token {token!r} is no {_MARK}…; ask the server for ids")
    return int(token.removeprefix(_MARK))
