"""What SGLang's own /generate answered, one response on a line.

    meta_info   input_token_logprobs, output_token_logprobs   [log p, id, text] of each token
                input_top_logprobs, output_top_logprobs       [[log p, id, text], ...] or nothing

Lists of one name start at the token that `logprob_start_len` asked for, which must be 0 so that the
tokens are the whole text. An entry of a token is the distribution that it was drawn from. Format:
sgl-project/sglang, its tokenizer manager.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pipeline.errors import DataError
from pipeline.exchange.containers import Row, plain
from pipeline.exchange.dump import Dump, Record, take
from pipeline.exchange.responses import OWN_TOKEN, Step, make_record


class SGLang(Dump):
    """Responses with `meta_info`, of the prompt's tokens and of those that were written."""

    open_questions: ClassVar = (
        "whether the server changed the logits by the request's temperature, biases or penalties",
        OWN_TOKEN,
    )

    name: Literal["sglang"] = "sglang"

    def records(self, row: Row, tokenizer: Any) -> Iterator[Record]:
        """See `Dump.records`."""
        said = plain(take(row, "meta_info"))
        read = said.get("input_token_logprobs") or []
        asked = said.get("prompt_tokens", len(read))
        if len(read) != asked:
            raise DataError(
                f"holds {len(read)} of the {asked} tokens of its prompt; ask the server with"
                " logprob_start_len 0"
            )
        steps = [*_read(said, "input"), *_read(said, "output")]
        yield make_record(steps)


def _read(said: Any, part: str) -> Sequence[Step]:
    own = said.get(f"{part}_token_logprobs") or []
    tops = said.get(f"{part}_top_logprobs") or [None] * len(own)
    if len(tops) != len(own):
        raise DataError(f"{part}_top_logprobs of {len(tops)} tokens, expected {len(own)}")
    return [
        (int(token), {int(i): p for p, i, *_ in [*(top or ()), (value, token)] if p is not None})
        for (value, token, *_), top in zip(own, tops, strict=True)
    ]
