"""Answers are spans of a context, taught and learned in whatever tokens."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_questions import (
    TASK,
    make_pair_tokenizer,
    make_question_cache,
    make_questions,
    make_reader,
    make_word_tokenizer,
)
from small_runs import TINY, make_student_config
from small_words import make_byte_tokenizer, save_byte_student
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering

from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.reading import Reading, open_reading
from pipeline.runs import read_result
from pipeline.sources import DataConfig, load_rows
from pipeline.student import HashedNgramTokenizer, build_student
from pipeline.targets import UNLABELLED
from pipeline.tasks.passages import best_span, match_ends, match_starts, read_passage
from pipeline.tasks.question_answering import QuestionAnswering
from stages.evaluate import evaluate
from stages.inspect import inspect
from stages.train_student import read_cache, train_student

BERT = {"from": "scratch", "architecture": "bert", **TINY}
ROW = {
    "id": "7",
    "question": "who?",
    "context": "the  bottles, still",
    "answers": {"text": ["bottles", "bottle"], "answer_start": [5, 5]},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_question_cache(tmp_path_factory.mktemp("questions"))


def make_examples(*rows: dict[str, Any], **settings: Any) -> list[Example]:
    task = QuestionAnswering(**settings)
    return list(task.examples(rows, make_byte_tokenizer(model_max_length=512), ()))


def own_reading(cache: Path, tokenizer: Any) -> Reading:
    return open_reading(TeacherCache.open(cache), tokenizer, None, "the-student")


def test_an_example_has_a_start_and_an_end_over_the_tokens_of_its_context() -> None:
    (example,) = make_examples(ROW)
    assert example.segment_lengths.tolist() == [6, 19, 1]  # [CLS] who? [SEP], bytes, [SEP]
    assert example.target_positions.tolist() == [0, 1]
    assert example.label_ids.tolist() == [6 + 5, 6 + 11]
    assert example.columns["answers"] == ["bottles", "bottle"]


def test_long_contexts_are_read_in_windows_that_lose_no_character() -> None:
    row = make_questions(3, longest=60)[2]
    row["context"] *= 5
    examples = make_examples(row, max_length=64, stride=20)
    assert [example.example_id for example in examples] == [
        f"{row['id']}@{number}" for number in range(len(examples))
    ]
    assert all(len(example.input_ids) <= 64 for example in examples)
    texts = [str(example.columns["context"]) for example in examples]
    place = 0
    for text in texts:
        begin = row["context"].index(text, max(0, place - 64))
        assert begin <= place and (begin == 0 or text[0] == " ")  # between two words
        place = begin + len(text)
    assert place == len(row["context"])
    answer = row["answers"]["text"][0]
    for example in examples:
        start, end = example.label_ids.tolist()
        if start != UNLABELLED:
            first = int(example.segment_lengths[0])
            assert str(example.columns["context"])[start - first : end - first + 1] == answer
    assert sum(example.label_ids[0] != UNLABELLED for example in examples) >= 1


def test_an_answer_that_is_cut_off_has_no_label() -> None:
    context = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    row = {
        "id": "1",
        "question": "?",
        "context": context,
        "answers": [{"text": "j k l", "answer_start": context.index("j")}],
    }
    examples = make_examples(row, max_length=24, stride=0)
    assert len(examples) == 3
    assert all(example.label_ids.tolist() == [UNLABELLED] * 2 for example in examples)


def test_a_question_keeps_at_most_half_of_the_tokens() -> None:
    (example,) = make_examples({**ROW, "question": "why " * 40}, max_length=64)
    assert example.segment_lengths.tolist() == [34, 19, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None}, "example 7: has None as its question, .*columns.question"),
        ({"context": " "}, "example 7: has ' ' as its context"),
        ({"answers": {"text": ["a"], "answer_start": []}}, "has 1 answers and 0 starts"),
        ({"answers": {"text": ["the"], "answer_start": [1]}}, "has 'he ' at 1, not the answer"),
    ],
)
def test_rows_that_do_not_fit_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_examples({**ROW, **row})


def test_a_tokenizer_without_characters_is_refused() -> None:
    with pytest.raises(ConfigError, match="the tokenizer is no fast one"):
        list(QuestionAnswering().examples([ROW], HashedNgramTokenizer(), ()))


def test_draws_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="question-answering rules classes out"):
        make_question_cache(tmp_path, targets={"top_k": 4, "tail_draws": 2})


def test_what_is_cached_is_what_the_teacher_says_over_the_context(cache: Path) -> None:
    opened, model, tokenizer = TeacherCache.open(cache), make_reader(), make_pair_tokenizer()
    assert opened.manifest.num_classes == 96
    for row, example in zip(make_questions(30), opened.stream(0, 0, shuffle=False), strict=True):
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt")
        inside = torch.tensor([part == 1 for part in encoded.sequence_ids(0)])
        assert example.input_ids.tolist() == encoded["input_ids"][0].tolist()
        with torch.no_grad():
            outputs = model(**encoded)
        for n, logits in enumerate((outputs.start_logits[0], outputs.end_logits[0])):
            for temperature in (1.0, 2.0):
                said = example.targets.at(temperature)
                dense = torch.zeros(96).scatter(0, said.ids[n], said.log_probs[n].exp())
                expected = torch.zeros(96)
                expected[: len(inside)][inside] = (logits[inside] / temperature).softmax(0)
                torch.testing.assert_close(dense, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("tokens", ["the same", "bytes"])
def test_training_from_the_cache_equals_training_with_the_live_teacher(
    cache: Path, tmp_path: Path, tokens: str
) -> None:
    student = BERT
    if tokens == "bytes":
        student = {"from": "pretrained"}
        save_byte_student(tmp_path / "own", make_reader(259, num_hidden_layers=1))
        student["model"] = str(tmp_path / "own")
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={**student, "dropout": 0.0},
        losses=[{"name": "forward_kl", "temperature": 2.0}],
        training={
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 100,
        },
    )
    reading = read_cache(config)
    live = build_student(config.student, reading.task, 96, reading.tokenizer, config.seed)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    rows = make_questions(30)[:20]
    said = [_ask_by_character(row, reading.tokenizer) for row in rows]
    for _ in range(2):
        losses = []
        for row, taught in zip(rows, said, strict=True):
            encoded = reading.tokenizer(row["question"], row["context"], return_tensors="pt")
            inside = torch.tensor([part == 1 for part in encoded.sequence_ids(0)])
            outputs = live(**encoded)
            for logits, target in zip(
                (outputs.start_logits, outputs.end_logits), taught, strict=True
            ):
                own = (logits[0, inside] / 2.0).log_softmax(0)
                losses.append(4.0 * functional.kl_div(own, target, reduction="sum"))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    train_student(config)
    found = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run").state_dict()
    assert read_result(tmp_path / "run").training["steps"] == 2
    for name, expected in live.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=0.0, atol=1e-5, msg=name)


def _ask_by_character(row: dict[str, Any], tokenizer: Any) -> list[torch.Tensor]:
    """The teacher's starts and ends at T = 2 over a student's context tokens, character by
    character."""
    teacher, own = make_pair_tokenizer(), row["context"]
    encoded = teacher(row["question"], own, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    places = [t for t, part in enumerate(encoded.sequence_ids(0)) if part == 1]
    with torch.no_grad():
        outputs = make_reader()(**encoded)
    spans = tokenizer(row["question"], own, return_offsets_mapping=True)
    tokens = [t for t, part in enumerate(spans.sequence_ids(0)) if part == 1]
    holders = {}  # character -> number of the student's token
    for number, token in enumerate(tokens):
        for character in range(*spans["offset_mapping"][token]):
            holders[character] = number
    found = []
    for logits, last in ((outputs.start_logits, False), (outputs.end_logits, True)):
        probabilities = (logits[0, places] / 2.0).softmax(0)
        moved = torch.zeros(len(tokens))
        for place, probability in zip(places, probabilities, strict=True):
            start, end = offsets[place]
            start += len(own[start:end]) - len(own[start:end].lstrip())
            moved[holders[end - 1 if last else start]] += probability
        found.append(moved)
    return found


def test_the_same_tokenizer_read_anew_changes_nothing(cache: Path) -> None:
    own = make_pair_tokenizer(unk_token="<s>")  # another digest, the same tokens
    reading, plain = own_reading(cache, own), own_reading(cache, None)
    assert reading.own_rows is not None and plain.own_rows is None
    for one, other in zip(reading.select("train"), plain.select("train"), strict=True):
        assert isinstance(one, CachedExample) and isinstance(other, CachedExample)
        for name in ("input_ids", "segment_lengths", "label_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.targets.grouped is None
        assert torch.equal(one.targets.logits, other.targets.logits)


def test_no_probability_is_lost_between_tokenizers_at_any_cached_temperature(cache: Path) -> None:
    for own in (make_byte_tokenizer(), make_word_tokenizer()):
        for example in own_reading(cache, own).select("test"):
            assert isinstance(example, CachedExample)
            first, count, _ = example.segment_lengths.tolist()
            for temperature in (1.0, 2.0):
                said = example.targets.at(temperature)
                dense = torch.zeros(2, 96).scatter(1, said.ids, said.log_probs.exp())
                inside = dense[:, first : first + count].sum(dim=1)
                torch.testing.assert_close(inside, torch.ones(2), rtol=0.0, atol=1e-5)
            labels = example.label_ids
            original = TeacherCache.open(cache).by_id(example.example_id).label_ids
            assert ((labels == UNLABELLED) == (original == UNLABELLED)).all()


def test_a_truncated_record_moves_what_it_kept(tmp_path: Path) -> None:
    small = make_question_cache(tmp_path, targets={"top_k": 3, "codec": "lossless"})
    for example in own_reading(small, make_word_tokenizer()).select("test"):
        assert isinstance(example, CachedExample)
        moved = example.targets.at(1.0)
        kept = TeacherCache.open(small).by_id(example.example_id).targets.at(1.0)
        torch.testing.assert_close(
            moved.log_probs.exp().sum(dim=1), kept.log_probs.exp().sum(dim=1)
        )
        torch.testing.assert_close(moved.tail_mass, kept.tail_mass, rtol=0.0, atol=1e-6)


def test_a_student_that_reads_less_keeps_what_the_teacher_said_of_that() -> None:
    context = "the still room holds many bottles"
    said = read_passage(make_pair_tokenizer(), "who?", context, 64)
    short = read_passage(make_byte_tokenizer(), "who?", context, 20)
    assert said.whole and not short.whole and len(short) == 13
    starts, ends = match_starts(said, short), match_ends(said, short)
    cut = said.starts >= short.ends[-1]
    assert cut.any() and (starts[cut] == -1).all() and (ends[cut] == -1).all()
    assert (starts[~cut] == said.starts[~cut]).all()
    assert short.find_span(4, 9) == (6 + 4, 6 + 8) and short.find_span(10, 20) is None


def test_another_context_is_refused(cache: Path) -> None:
    said = TeacherCache.open(cache)[0]
    task = QuestionAnswering(**TASK)
    rows = [{**make_questions(1)[0], "context": "another text", "answers": None}]
    (own,) = task.examples(rows, make_byte_tokenizer(model_max_length=96), ())
    with pytest.raises(MismatchError, match="has another context than the cached one"):
        task.align(own, said, make_byte_tokenizer(), make_pair_tokenizer())


def test_the_best_span_is_no_longer_than_allowed_and_runs_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, longest in ((1, 5), (7, 3), (12, 30)):
        start, end = torch.randn(2, size, generator=generator)
        pairs = {
            (i, j): float(start[i] + end[j])
            for i in range(size)
            for j in range(i, min(i + longest, size))
        }
        first, last, score = best_span(start, end, longest)
        assert (first, last) == max(pairs, key=pairs.__getitem__)
        assert score == pytest.approx(pairs[first, last])


def test_a_run_measures_answers_and_languages(cache: Path, tmp_path: Path) -> None:
    folder = save_byte_student(tmp_path / "own", make_reader(259))
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={"from": "pretrained", "model": str(folder)},
        losses=[{"name": "forward_kl"}, {"name": "cross_entropy"}],
        evaluation={"slices": ["language"]},
    )
    train_student(config)
    result = read_result(tmp_path / "run")
    for name in ("exact_match", "f1", "loss", "agreement", "kl_to_teacher"):
        assert result.metric(name) is not None, name
    told = {m["name"]: m["value"] for m in result.details["teacher"]["metrics"]}
    assert {"exact_match", "f1"} <= set(told)
    again = {(m.name, m.slice): m.value for m in evaluate(tmp_path / "run")}
    assert again["f1", "all"] == pytest.approx(result.metric("f1"))


def test_an_inspected_example_shows_where_its_answer_may_be(cache: Path) -> None:
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        inspect(cache, "q0", console)
    shown = captured.get()
    example = TeacherCache.open(cache).by_id("q0")
    start, end = example.label_ids.tolist()
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()[:1].isdigit()}
    assert "p(start)" in shown
    assert lines[str(start)].rstrip().endswith("start") and lines[str(end)].rstrip().endswith("end")


REAL = os.environ.get("STILLROOM_DATA")


@pytest.mark.skipif(not REAL, reason="STILLROOM_DATA is not set")
def test_every_answer_of_xquad_is_found_again_from_its_tokens() -> None:
    splits = {name: name for name in ("train", "validation", "test")}
    rows = load_rows(DataConfig(source="xquad", name=["en", "th"], splits=splits))
    task = QuestionAnswering(max_length=1024, stride=400)
    tokenizer = make_byte_tokenizer(model_max_length=1024)
    questions, labelled = set(), set()
    some = [row for number, row in enumerate(rows) if number % 25 == 0]
    for example in task.examples(some, tokenizer, ()):
        columns = example.columns
        name = example.example_id.removesuffix(f"@{columns['window']}")
        questions.add(name)
        if example.label_ids[0] == UNLABELLED:
            continue
        labelled.add(name)
        passage = read_passage(tokenizer, columns["question"], columns["context"], 1024)
        start, end = example.label_ids - passage.first
        found = str(columns["context"])[passage.starts[start] : passage.ends[end]]
        assert found == columns["answers"][0].strip(), example.example_id
    assert len(rows) == 2 * 1190 and len(questions) == len(some)
    assert labelled == questions


def test_articles_stay_together_in_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not REAL:
        pytest.skip("STILLROOM_DATA is not set")
    titles = {}
    for split in ("train", "validation", "test"):
        rows = load_rows(DataConfig(source="xquad", splits={split: split}, carry=["title"]))
        titles[split] = {row["title"] for row in rows}
    assert {split: len(found) for split, found in titles.items()} == {
        "train": 30,
        "validation": 6,
        "test": 12,
    }
    assert all(not one & other for one, other in pairwise([*titles.values(), titles["train"]]))
