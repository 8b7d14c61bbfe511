"""Language modelling: which tokens an example holds, and which of them are targets."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_teachers import make_tokenizer
from transformers import PreTrainedTokenizerFast

from pipeline.errors import DataError
from pipeline.examples import Example
from pipeline.tasks.causal_lm import CausalLM

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Keeps the assistant's words only in the last turn, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}<s>{{ m.role }}\n"
    "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def examples(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    carry: Sequence[str] = (),
    **settings: Any,
) -> list[Example]:
    named = [{"id": f"row {i}", "split": "train", **row} for i, row in enumerate(rows)]
    return list(CausalLM(**settings).examples(named, tokenizer, carry))


def documents(example: Example) -> list[np.ndarray]:
    return np.split(example.input_ids, np.cumsum(example.segment_lengths)[:-1])


def text_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    text = "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))
    return text.replace("Ġ", " ").replace("Ċ", "\n")  # how a byte-level BPE writes these bytes


def learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the tokens whose distribution is asked for."""
    return text_of(example.label_ids, tokenizer)


@cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


TEXTS = st.lists(st.text("abcd \n", max_size=40), min_size=1, max_size=8)


@settings(max_examples=30)
@given(texts=TEXTS, block=st.integers(2, 24), groups=st.lists(st.integers(0, 1), min_size=8))
def test_packing_holds_every_token_of_every_document_once_and_in_order(
    texts: list[str], block: int, groups: list[int]
) -> None:
    tokenizer = shared_tokenizer()
    rows = [{"text": text, "language": str(g)} for text, g in zip(texts, groups, strict=False)]
    found = examples(rows, tokenizer, carry=["language"], block_size=block)
    for language in ("0", "1"):
        own = [row["text"] for row in rows if row["language"] == language]
        expected = [[BOS, *tokenizer(text)["input_ids"], EOS] for text in own]
        kept = [e for e in found if e.columns["language"] == language]
        together = [int(token) for e in kept for token in e.input_ids]
        assert together == [token for ids in expected for token in ids]
        pieces = [piece for e in kept for piece in documents(e)]
        assert all(len(piece) for piece in pieces)
        assert sum(piece[0] == BOS for piece in pieces) == len(own)
    for example in found:
        assert len(example.input_ids) <= block
        assert int(example.segment_lengths.sum()) == len(example.input_ids)
        assert_targets(example)
    assert len({e.example_id for e in found}) == len(found)


def assert_targets(example: Example) -> None:
    """Everything is a target but the first token of each document, whose neighbour is foreign."""
    ends = np.cumsum(example.segment_lengths) - 1
    expected = np.setdiff1d(np.arange(len(example.input_ids)), ends)
    np.testing.assert_array_equal(example.target_positions, expected)
    np.testing.assert_array_equal(example.label_ids, example.input_ids[expected + 1])


@settings(max_examples=30)
@given(texts=TEXTS, block=st.integers(4, 24))
def test_without_packing_a_document_is_cut_into_named_pieces(texts: list[str], block: int) -> None:
    tokenizer = shared_tokenizer()
    found = examples([{"text": t} for t in texts], tokenizer, packing=False, block_size=block)
    whole: dict[str, list[int]] = {}
    for example in found:
        assert len(example.segment_lengths) == 1
        assert_targets(example)
        whole.setdefault(example.example_id.split("@")[0], []).extend(example.input_ids.tolist())
    expected = {f"row {i}": [BOS, *tokenizer(t)["input_ids"], EOS] for i, t in enumerate(texts)}
    assert whole == expected


def test_blocks_never_mix_splits(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "the bottles", "split": split} for split in ("train", "train", "test")]
    found = examples(rows, tokenizer, block_size=64)
    assert [(e.columns["split"], len(e.segment_lengths)) for e in found] == [
        ("train", 2),
        ("test", 1),
    ]


def test_position_ids_restart_with_each_document(tokenizer: PreTrainedTokenizerFast) -> None:
    task = CausalLM(block_size=64)
    one, two = examples([{"text": "students"}, {"text": "room"}], tokenizer, packing=False)
    both = examples([{"text": "students"}, {"text": "room"}], tokenizer)[0]
    inputs = task.batch([both, two], pad_id=EOS).inputs
    first, second = len(one.input_ids), len(two.input_ids)
    restarting = [*range(first), *range(second)]
    assert inputs["position_ids"][0].tolist() == restarting
    assert inputs["position_ids"][1].tolist() == list(range(first + second))
    assert "attention_mask" not in inputs


def test_bos_and_eos_frame_a_document_once(tokenizer: PreTrainedTokenizerFast) -> None:
    [plain] = examples([{"text": "room"}], tokenizer)
    assert (plain.input_ids[0], plain.input_ids[-1]) == (BOS, EOS)
    [framed] = examples([{"text": "<s>room</s>"}], tokenizer)
    np.testing.assert_array_equal(framed.input_ids, plain.input_ids)
    [empty] = examples([{"text": ""}], tokenizer)
    assert empty.input_ids.tolist() == [BOS, EOS]
    bare = make_tokenizer(bos_token=None, eos_token=None, pad_token=None)
    [unframed] = examples([{"text": "room"}], bare)
    assert unframed.input_ids.tolist() == plain.input_ids[1:-1].tolist()


def test_one_token_for_both_marks_stands_at_both_ends() -> None:
    both = make_tokenizer(bos_token="</s>")
    [example] = examples([{"text": "room"}], both)
    assert (example.input_ids[0], example.input_ids[-1]) == (EOS, EOS)
    [empty] = examples([{"text": ""}], both)
    assert empty.input_ids.tolist() == [EOS, EOS]


def test_a_prompt_is_read_and_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    [example] = examples([{"prompt": "the teacher", "completion": " speaks"}], tokenizer)
    assert learned(example, tokenizer) == " speaks</s>"
    assert text_of(example.input_ids, tokenizer) == "<s>the teacher speaks</s>"
    first = int(example.target_positions[0])  # the last token of the prompt asks for the first
    assert text_of(example.input_ids[: first + 1], tokenizer) == "<s>the teacher"


def test_packed_prompts_stay_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "the teacher", "completion": " speaks"}] * 3
    [packed] = examples(rows, tokenizer, block_size=128)
    assert learned(packed, tokenizer) == " speaks</s>" * 3


def test_only_the_assistants_turns_are_learned() -> None:
    chatting = make_tokenizer(chat_template=CHAT)
    messages = [
        {"role": "system", "content": "speaks"},
        {"role": "user", "content": "the teacher"},
        {"role": "assistant", "content": "once"},
        {"role": "user", "content": "the room"},
        {"role": "assistant", "content": "many bottles"},
    ]
    [example] = examples([{"messages": messages}], chatting)
    assert learned(example, chatting) == "once</s>many bottles</s>"
    whole = chatting.apply_chat_template(messages, tokenize=False)
    assert text_of(example.input_ids, chatting) == whole
    assert int(example.segment_lengths[0]) == len(example.input_ids)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"words": "x"}, None, "'?row 0'?: has neither text, nor prompt and completion, nor mess"),
        ({"prompt": "x"}, None, "has neither text, nor prompt and completion"),
        ({"messages": []}, None, "is a chat, but the tokenizer has no chat template"),
        (
            {
                "messages": [
                    {"role": "user", "content": "the"},
                    {"role": "assistant", "content": "room"},
                    {"role": "user", "content": "the"},
                    {"role": "assistant", "content": "teacher"},
                ]
            },
            REWRITING,
            "template does not keep earlier turns unchanged.* turn 1 .*one row per answer",
        ),
    ],
)
def test_rows_that_cannot_be_learned_are_named(
    row: dict[str, Any], template: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        examples([row], make_tokenizer(chat_template=template))


def test_what_is_too_long_is_split_cut_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "the still room holds many bottles"}, {"text": "once"}]
    length = len(tokenizer(rows[0]["text"])["input_ids"]) + 2
    block = length - 2
    with pytest.raises(DataError, match=rf"row 0: is {length} tokens long, block_size is {block}"):
        examples(rows, tokenizer, block_size=block, overlong="refuse")
    cut, other = examples(rows, tokenizer, block_size=block, overlong="truncate")
    np.testing.assert_array_equal(
        cut.input_ids, [BOS, *tokenizer(rows[0]["text"])["input_ids"]][:block]
    )
    assert other.input_ids[0] == BOS
    split = examples(rows, tokenizer, block_size=block)
    assert sum(len(e.input_ids) for e in split) == length + len(other.input_ids)


@settings(max_examples=30)
@given(texts=TEXTS, block=st.integers(4, 24))
def test_truncated_documents_are_never_split_between_blocks(texts: list[str], block: int) -> None:
    tokenizer = shared_tokenizer()
    rows = [{"text": text} for text in texts]
    found = examples(rows, tokenizer, block_size=block, overlong="truncate")
    pieces = [piece.tolist() for example in found for piece in documents(example)]
    assert pieces == [[BOS, *tokenizer(t)["input_ids"], EOS][:block] for t in texts]


def test_the_class_space_covers_every_id(tokenizer: PreTrainedTokenizerFast) -> None:
    assert CausalLM().num_classes(tokenizer) == 300
