"""Responses of servers, as vLLM, OpenAI and SGLang shape them, become what the teacher said."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_dumps import Said, import_files, say, write_lines

from pipeline.errors import DataError

K, PROMPT = 6, 5
TEXTS = [say(number) for number in range(4)]


def logprobs_of(said: Said, row: int) -> dict[str, Any]:
    """vLLM's own: the token that followed first, then the most probable ones."""
    own = int(said.tokens[row + 1])
    found = {str(own): {"logprob": said.own(row), "rank": 99, "decoded_token": f"w{own}"}}
    for rank, (token, value) in enumerate(said.top(K, row), start=1):
        found[str(token)] = {"logprob": value, "rank": rank, "decoded_token": f"w{token}"}
    return found


def as_prompt(said: Said) -> dict[str, Any]:
    rows = range(len(said.log_probs))
    return {
        "id": "cmpl-1",
        "choices": [
            {
                "text": "",
                "prompt_token_ids": said.tokens.tolist(),
                "prompt_logprobs": [None, *(logprobs_of(said, row) for row in rows)],
            }
        ],
    }


def as_offline(said: Said) -> dict[str, Any]:
    """vLLM's RequestOutput: a prompt, and the tokens that were written after it."""
    rows = range(len(said.log_probs))
    lists: list[Any] = [None, *(logprobs_of(said, row) for row in rows)]
    return {
        "prompt_token_ids": said.tokens[:PROMPT].tolist(),
        "prompt_logprobs": lists[:PROMPT],
        "outputs": [{"token_ids": said.tokens[PROMPT:].tolist(), "logprobs": lists[PROMPT:]}],
    }


def as_chat(said: Said, spell: str = "w", repeat_ids: bool = True) -> dict[str, Any]:
    """A chat completion: only what was written has log-probabilities."""
    content = [
        {
            "token": f"{spell}{said.tokens[row + 1]}",
            "logprob": said.own(row),
            "bytes": None,
            "top_logprobs": [
                {"token": f"{spell}{token}", "logprob": value, "bytes": None}
                for token, value in said.top(K, row)
            ],
        }
        for row in range(PROMPT - 1, len(said.log_probs))
    ]
    choice: dict[str, Any] = {"index": 0, "logprobs": {"content": content}}
    if repeat_ids:
        choice["token_ids"] = said.tokens[PROMPT:].tolist()
        return {"prompt_token_ids": said.tokens[:PROMPT].tolist(), "choices": [choice]}
    return {"choices": [choice]}


def as_completion(said: Said, spell: str = "token_id:") -> dict[str, Any]:
    """A completion that echoes its prompt."""
    rows = range(len(said.log_probs))
    tops = [{f"{spell}{token}": value for token, value in said.top(K, row)} for row in rows]
    logprobs = {
        "tokens": [f"{spell}{token}" for token in said.tokens],
        "token_logprobs": [None, *(said.own(row) for row in rows)],
        "top_logprobs": [None, *tops],
        "text_offset": [0] * len(said.tokens),
    }
    return {"choices": [{"text": said.spell(), "logprobs": logprobs}]}


def as_sglang(said: Said) -> dict[str, Any]:
    rows = range(len(said.log_probs))
    own: list[Any] = [[None, int(said.tokens[0]), None]]
    own += [[said.own(row), int(said.tokens[row + 1]), None] for row in rows]
    tops: list[Any] = [None, *([[p, i, None] for i, p in said.top(K, row)] for row in rows)]
    return {
        "text": "",
        "meta_info": {
            "prompt_tokens": PROMPT,
            "input_token_logprobs": own[:PROMPT],
            "input_top_logprobs": tops[:PROMPT],
            "output_token_logprobs": own[PROMPT:],
            "output_top_logprobs": tops[PROMPT:],
        },
    }


def assert_says_all(cache: Any, texts: list[Said], first: int = 0) -> None:
    """The most probable ones, and the token that followed where it is none of them."""
    for row, said in enumerate(texts):
        example = cache[row]
        assert example.input_ids.tolist() == said.tokens.tolist()
        assert example.target_positions.tolist() == [*range(first, len(said.log_probs))]
        distribution = example.targets.at(1.0)
        for index, position in enumerate(example.target_positions.tolist()):
            expected = dict(said.top(K, position))
            expected[int(said.tokens[position + 1])] = said.own(position)
            present = distribution.log_probs[index] > -torch.inf
            ids = distribution.ids[index][present].tolist()
            values = distribution.log_probs[index][present].tolist()
            assert dict(zip(ids, values, strict=True)) == pytest.approx(expected, abs=1e-5)
            label = float(example.targets.label_log_probs[index])
            assert label == pytest.approx(said.own(position), abs=1e-5)


@pytest.mark.parametrize("form", [as_prompt, as_offline, as_completion])
def test_every_token_has_what_it_was_drawn_from(tmp_path: Path, form: Any) -> None:
    file = write_lines(tmp_path / "dump.jsonl", [form(said) for said in TEXTS])
    cache = import_files(tmp_path, "vllm", file)
    assert_says_all(cache, TEXTS)
    assert cache.manifest.imported is not None
    assert cache.manifest.imported.rows["entries"] == [K, K + 1]


def test_sglang_says_the_same(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", [as_sglang(said) for said in TEXTS])
    assert_says_all(import_files(tmp_path, "sglang", file), TEXTS)


@pytest.mark.parametrize("spell", ["w", "token_id:"])
def test_a_chat_says_only_what_was_written(tmp_path: Path, spell: str) -> None:
    file = write_lines(tmp_path / "dump.jsonl", [as_chat(said, spell) for said in TEXTS])
    assert_says_all(import_files(tmp_path, "vllm", file), TEXTS, first=PROMPT - 1)


def test_texts_of_tokens_become_their_ids(tmp_path: Path) -> None:
    rows = [
        {
            "custom_id": f"request-{number}",
            "asked": [{"role": "user", "content": said.spell(0, PROMPT)}],
            "response": {"body": as_chat(said, repeat_ids=False)},
        }
        for number, said in enumerate(TEXTS)
    ]
    format = {
        "name": "openai",
        "response_field": "response.body",
        "messages_field": "asked",
        "id_field": "custom_id",
    }
    cache = import_files(tmp_path, format, write_lines(tmp_path / "dump.jsonl", rows))
    assert list(cache.ids()) == [f"request-{number}" for number in range(4)]
    assert_says_all(cache, TEXTS, first=PROMPT - 1)


def test_a_candidate_without_an_id_is_left_to_the_tail(tmp_path: Path) -> None:
    row = as_chat(TEXTS[0])
    step = row["choices"][0]["logprobs"]["content"][0]
    lost = next(e for e in step["top_logprobs"] if e["token"] != step["token"])
    lost["token"] = "a text that is no token"
    cache = import_files(tmp_path, "openai", write_lines(tmp_path / "dump.jsonl", [row]))
    found = TEXTS[0].top(K, PROMPT - 1)
    kept = {i: p for i, p in found if p != lost["logprob"]}
    kept[int(TEXTS[0].tokens[PROMPT])] = TEXTS[0].own(PROMPT - 1)
    tail = float(cache[0].targets.at(1.0).tail_mass[0])
    mass = sum(math.exp(value) for value in kept.values())
    assert tail == pytest.approx(1 - mass, abs=1e-5)
    assert cache.manifest.imported is not None
    assert cache.manifest.imported.rows["unnamed"] == 1


def test_a_token_without_an_id_is_refused(tmp_path: Path) -> None:
    row = {**as_chat(TEXTS[0], repeat_ids=False), "prompt": TEXTS[0].spell(0, PROMPT)}
    row["choices"][0]["logprobs"]["content"][2]["token"] = "no token"
    with pytest.raises(DataError, match=r"row 0: token 'no token' is not one token"):
        import_files(tmp_path, "openai", write_lines(tmp_path / "dump.jsonl", [row]))


def test_an_answer_without_its_prompt_is_refused(tmp_path: Path) -> None:
    row = as_chat(TEXTS[0], repeat_ids=False)
    with pytest.raises(DataError, match="neither prompt_token_ids nor the prompt"):
        import_files(tmp_path, "openai", write_lines(tmp_path / "dump.jsonl", [row]))


def test_logprobs_of_another_prompt_are_refused(tmp_path: Path) -> None:
    row = as_prompt(TEXTS[0])
    row["choices"][0]["prompt_token_ids"] = TEXTS[1].tokens.tolist()
    with pytest.raises(DataError, match="row 0: prompt_logprobs of token 1 do not hold its id"):
        import_files(tmp_path, "vllm", write_lines(tmp_path / "dump.jsonl", [row]))


def test_several_choices_are_several_examples(tmp_path: Path) -> None:
    row = as_chat(TEXTS[0])
    row["choices"] = [*row["choices"], *row["choices"]]
    cache = import_files(tmp_path, "vllm", write_lines(tmp_path / "dump.jsonl", [row]))
    assert list(cache.ids()) == ["dump:0", "dump:0#1"]


def test_what_a_server_calls_impossible_is_not_there(tmp_path: Path) -> None:
    row = as_prompt(TEXTS[0])
    step = row["choices"][0]["prompt_logprobs"][1]
    own = str(TEXTS[0].tokens[1])
    gone = next(token for token in step if token != own)
    step[gone]["logprob"] = -9999.0
    cache = import_files(tmp_path, "vllm", write_lines(tmp_path / "dump.jsonl", [row]))
    distribution = cache[0].targets.at(1.0)
    present = distribution.log_probs[0] > -torch.inf
    assert int(gone) not in distribution.ids[0][present].tolist()


def test_a_prompt_that_sglang_began_late_is_refused(tmp_path: Path) -> None:
    row = as_sglang(TEXTS[0])
    row["meta_info"]["input_token_logprobs"] = row["meta_info"]["input_token_logprobs"][2:]
    with pytest.raises(DataError, match="logprob_start_len 0"):
        import_files(tmp_path, "sglang", write_lines(tmp_path / "dump.jsonl", [row]))
