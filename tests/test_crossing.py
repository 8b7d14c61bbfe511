"""A language model that learns from a teacher with another tokenizer, where both stand alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_data, make_language_cache, make_student_config, read_lines
from small_teachers import make_llama, make_tokenizer, save_teacher
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.crossing import find_ends, match_targets
from pipeline.errors import DataError, MismatchError
from pipeline.examples import Example
from pipeline.runs import read_result
from pipeline.tasks.causal_lm import CausalLM
from stages.evaluate import evaluate
from stages.train_student import train_student

TEACHERS = make_tokenizer()


def make_other_tokenizer() -> PreTrainedTokenizerFast:
    """Other merges, another size, and no token before a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["speaks bottle students hold an teach"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


STUDENTS = make_other_tokenizer()
TEXTS = st.text(st.sampled_from("the still room ñ한🙂"), min_size=1, max_size=40).filter(str.strip)


def tokenize(text: str, tokenizer: Any) -> Example:
    task = CausalLM(packing=False, block_size=512)
    (example,) = task.examples([{"id": "a", "text": text}], tokenizer, ["text"])
    return example


@given(text=TEXTS)
@settings(deadline=None)
def test_matched_targets_have_the_same_text_before_them(text: str) -> None:
    own, said = tokenize(text, STUDENTS), tokenize(text, TEACHERS)
    found = match_targets(own, said, STUDENTS, TEACHERS)
    assert len(found) == len(own.target_positions)
    for mine, theirs in zip(own.target_positions, found, strict=True):
        if theirs >= 0:
            before = own.input_ids[: mine + 1].tolist()
            other = said.input_ids[: said.target_positions[theirs] + 1].tolist()
            assert decode(STUDENTS, before) == decode(TEACHERS, other)
    last = [len(example.input_ids) - 2 for example in (own, said)]  # what comes after the text
    assert own.target_positions[-1] == last[0]
    assert said.target_positions[found[-1]] == last[1]


def decode(tokenizer: Any, ids: list[int]) -> str:
    special = set(tokenizer.all_special_ids)
    return "".join(tokenizer.convert_ids_to_tokens([i for i in ids if i not in special]))


@given(text=TEXTS)
@settings(deadline=None)
def test_with_one_tokenizer_every_whole_place_is_matched_to_itself(text: str) -> None:
    example = tokenize(text, TEACHERS)
    found = match_targets(example, example, TEACHERS, TEACHERS)
    ends = find_ends(text, example.input_ids, TEACHERS)[example.target_positions]
    assert found[ends >= 0].tolist() == np.flatnonzero(ends >= 0).tolist()
    assert (found[ends < 0] == -1).all()  # within a character of several bytes


def test_tokens_of_another_text_are_refused() -> None:
    own = tokenize("the still room", STUDENTS)
    with pytest.raises(MismatchError, match="a text and its tokens do not belong together"):
        find_ends("bottles", own.input_ids, STUDENTS)
    bare = Example(**{**vars(own), "columns": {}})
    with pytest.raises(DataError, match="its text is not carried"):
        match_targets(bare, own, STUDENTS, TEACHERS)
    packed = Example(**{**vars(own), "segment_lengths": np.array([1, len(own.input_ids) - 1])})
    with pytest.raises(MismatchError, match=r"with task\.packing false"):
        match_targets(packed, own, STUDENTS, TEACHERS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of whole documents, and an untrained student with its own tokenizer."""
    root = tmp_path_factory.mktemp("crossing")
    save_teacher(root / "student", make_llama(vocab_size=272, num_hidden_layers=1), STUDENTS)
    task = {"name": "causal-lm", "packing": False, "block_size": 60, "overlong": "truncate"}
    data = {**make_data(root), "carry": ["text"]}
    make_language_cache(root, task=task, data=data, hidden={}, targets={"top_k": 32})
    return root


def test_a_student_with_its_own_tokenizer_learns_from_sorted_probabilities(
    world: Path, tmp_path: Path
) -> None:
    config = make_student_config(
        world / "cache",
        tmp_path / "run",
        student={"from": "pretrained", "model": str(world / "student")},
        losses=[{"name": "uld", "weight": 5.0}, {"name": "cross_entropy", "weight": 0.1}],
        training={"num_train_epochs": 16, "learning_rate": 5e-3, "logging_steps": 1},
    )
    run = train_student(config)
    lines = [line for line in read_lines(run) if "term/uld@cache" in line]
    assert lines[-1]["term/uld@cache"] < 0.8 * lines[0]["term/uld@cache"]
    result = read_result(run)
    names = {metric.name for metric in result.metrics}
    assert "loss" in names
    assert not names & {"agreement", "kl_to_teacher"}  # classes that are not the student's
    assert result.details["teacher"]["metrics"] == []
    again = {metric.name: metric.value for metric in evaluate(run, device="cpu")}
    for metric in result.metrics:
        assert again[metric.name] == pytest.approx(metric.value, rel=1e-4)


def test_a_loss_that_reads_ids_is_refused(world: Path, tmp_path: Path) -> None:
    config = make_student_config(
        world / "cache",
        tmp_path / "run",
        student={"from": "pretrained", "model": str(world / "student")},
        losses=[{"name": "forward_kl"}, {"name": "uld"}],
    )
    with pytest.raises(MismatchError, match="or a loss that crosses tokenizers: uld"):
        train_student(config)
