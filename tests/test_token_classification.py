"""Words meet their tags and what a teacher said of them, whatever tokens are read."""

import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import TINY, make_student_config, read_lines
from small_teachers import make_tokenizer
from small_words import (
    TAGS,
    make_byte_tokenizer,
    make_sentences,
    make_tag_cache,
    make_tagger,
    save_byte_student,
)
from torch.nn import functional
from transformers import AutoModelForTokenClassification

from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.reading import Reading, open_reading
from pipeline.runs import read_result
from pipeline.sources import DataConfig, load_rows
from pipeline.student import HashedNgramTokenizer, build_student
from pipeline.targets import UNLABELLED
from pipeline.tasks.token_classification import TokenClassification
from pipeline.teacher.sparse import sparse_targets
from stages.evaluate import evaluate
from stages.inspect import inspect
from stages.train_student import read_cache, train_student

BERT = {"from": "scratch", "architecture": "bert", **TINY}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tag_cache(tmp_path_factory.mktemp("tags"))


def make_examples(rows: list[dict[str, Any]], **settings: Any) -> list[Example]:
    task = TokenClassification(**{"labels": TAGS, **settings})
    return list(task.examples(rows, make_byte_tokenizer(), ()))


def own_reading(cache: Path, tokenizer: Any) -> Reading:
    return open_reading(TeacherCache.open(cache), tokenizer, None, "the-student")


def test_a_words_target_is_at_its_first_subword() -> None:
    row = {"id": "1", "tokens": ["ab", "c", "def"], "tags": [1, None, 3]}
    (example,) = make_examples([row])
    assert example.segment_lengths.tolist() == [1, 2, 1, 3, 1]  # [CLS], the words, [SEP]
    assert example.target_positions.tolist() == [1, 3, 4]
    assert example.label_ids.tolist() == [1, UNLABELLED, 3]


def test_words_are_read_as_they_are_within_a_text() -> None:
    text = " the still room holds many bottles"
    row = {"id": "1", "tokens": text.split()}
    for tokenizer in (make_tokenizer(), make_byte_tokenizer()):
        (example,) = TokenClassification(labels=TAGS).examples([row], tokenizer, ())
        read = tokenizer.convert_ids_to_tokens(example.input_ids[example.target_positions])
        expected = ["Ġthe", "Ġst"] if tokenizer.sep_token is None else ["t", "s"]
        assert read[:2] == expected


def test_words_without_tokens_or_behind_the_limit_have_no_target_and_shift_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = {"id": "1", "tokens": ["ab", "", "cd", "efg", "h"], "tags": [0, 1, 2, 3, 0]}
    with caplog.at_level(logging.WARNING):
        (example,) = make_examples([row], max_length=7)
    assert example.segment_lengths.tolist() == [1, 2, 0, 2, 1, 0, 1]
    assert example.target_positions.tolist() == [1, 3, 5]
    assert example.label_ids.tolist() == [0, 2, 3]  # the cut word keeps its tag
    assert "2 of 5 words have no target" in caplog.text
    assert TokenClassification(labels=TAGS).row(example)["tags"] == [0, None, 2, 3, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": [1, 2]}, "example 9: has 2 tags for 1 tokens"),
        ({"tokens": ["a"], "tags": [4]}, "example 9: tag 4 is outside the label set of 4"),
        ({"tokens": "a b"}, "example 9: has 'a b' as its tokens, .*columns.tokens"),
        ({"tokens": []}, "expected a list of words"),
    ],
)
def test_rows_that_do_not_fit_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_examples([{"id": "9", **row}])


def test_a_tokenizer_that_cannot_tell_words_is_refused() -> None:
    task = TokenClassification(labels=TAGS)
    with pytest.raises(ConfigError, match="the tokenizer is no fast one"):
        list(task.examples([{"id": "1", "tokens": ["a"]}], HashedNgramTokenizer(), ()))


def test_what_is_cached_is_what_the_teacher_says_at_first_subwords(cache: Path) -> None:
    opened = TeacherCache.open(cache)
    tokenizer, model = make_tokenizer(model_max_length=128), make_tagger()
    assert opened.manifest.label_names == TAGS
    assert opened.manifest.columns["tokens"] == "strings"
    for row, example in zip(make_sentences(30), opened.stream(0, 0, shuffle=False), strict=True):
        assert (example.example_id, example.columns["tokens"]) == (row["id"], row["tokens"])
        running = [f" {word}" for word in row["tokens"]]  # as this tokenizer learned its words
        encoded = tokenizer(running, is_split_into_words=True, return_tensors="pt")
        words = encoded.word_ids(0)
        first = [words.index(word) for word in range(len(row["tokens"]))]
        with torch.no_grad():
            said = model(**encoded, output_hidden_states=True)
        expected = said.logits[0, first].log_softmax(-1)
        cached = example.targets.at(1.0)
        torch.testing.assert_close(
            cached.log_probs, expected.gather(1, cached.ids), rtol=0.0, atol=1e-5
        )
        torch.testing.assert_close(
            example.hidden["layer.2"], said.hidden_states[-1][0, first], rtol=0.0, atol=1e-5
        )
        tags = row["tags"] or [None] * len(first)
        labels = [UNLABELLED if tag is None else TAGS.index(tag) for tag in tags]
        assert example.label_ids.tolist() == labels


def test_the_same_tokenizer_read_anew_changes_nothing(cache: Path) -> None:
    own = make_tokenizer(model_max_length=128, unk_token="<s>")  # another digest, the same tokens
    reading, plain = own_reading(cache, own), own_reading(cache, None)
    assert reading.own_rows is not None and plain.own_rows is None
    for split in ("train", "test"):
        for one, other in zip(reading.select(split), plain.select(split), strict=True):
            assert isinstance(one, CachedExample) and isinstance(other, CachedExample)
            for name in ("input_ids", "segment_lengths", "target_positions", "label_ids"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert torch.equal(one.targets.logits, other.targets.logits)
            assert torch.equal(one.hidden["layer.2"], other.hidden["layer.2"])


def test_another_tokenizer_gets_what_the_teacher_said_of_the_same_words(cache: Path) -> None:
    reading = own_reading(cache, make_byte_tokenizer())
    said = TeacherCache.open(cache)
    for example in reading.select("train"):
        assert isinstance(example, CachedExample)
        words = said.by_id(example.example_id).columns["tokens"]
        ids = [example.input_ids[t] for t in example.target_positions]
        assert isinstance(words, list)
        assert ids == [make_byte_tokenizer()(word)["input_ids"][1] for word in words]
        told = said.by_id(example.example_id).targets
        assert torch.equal(example.targets.logits, told.logits)
        assert torch.equal(example.targets.label_ids, told.label_ids)


def test_words_that_one_side_lost_are_dropped_on_both() -> None:
    task = TokenClassification(labels=TAGS, max_length=8)
    row = {"id": "1", "tokens": ["ab", "", "cd", "efg", "h"], "tags": [0, 1, 2, 3, 0]}
    (mine,) = task.examples([row], make_byte_tokenizer(), ())
    (whole,) = TokenClassification(labels=TAGS).examples([row], make_tokenizer(), ())
    said = _say(whole)
    joined = task.align(mine, said, None, None)
    kept = [0, 1, 2]  # of the teacher's targets, which are about words 0, 2, 3 and 4
    assert joined.target_positions.tolist() == [1, 3, 5]
    assert torch.equal(joined.targets.logits, said.targets.logits[kept])
    assert torch.equal(joined.hidden["layer.1"], said.hidden["layer.1"][kept])
    assert torch.equal(joined.hidden["pooled"], said.hidden["pooled"])
    dropped = Example(**{f.name: getattr(joined, f.name) for f in fields(Example)})
    again = task.align(dropped, said, None, None)  # as a further teacher is asked
    assert torch.equal(again.targets.logits, joined.targets.logits)
    back = task.align(whole, _say(mine), None, None)
    assert len(back.targets) == len(back.target_positions) == 3
    with pytest.raises(MismatchError, match="has 1 words, the cached one 5"):
        (other,) = task.examples([{"id": "1", "tokens": ["ab"]}], make_byte_tokenizer(), ())
        task.align(other, said, None, None)


def _say(example: Example) -> CachedExample:
    """What a teacher might say: number n of the targets has logits of n."""
    count = len(example.target_positions)
    logits = torch.arange(count).float()[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    labels = torch.from_numpy(example.label_ids).long()
    states = torch.arange(count).float()[:, None]
    return CachedExample(
        **vars(example),
        targets=sparse_targets(logits, 4, 0, (1.0,), labels),
        hidden={"layer.1": states, "pooled": torch.ones(1, 1)},
    )


@pytest.mark.parametrize("tokens", ["the same", "bytes"])
def test_training_from_the_cache_equals_training_with_the_live_teacher(
    cache: Path, tmp_path: Path, tokens: str
) -> None:
    student = BERT
    if tokens == "bytes":
        folder = save_byte_student(tmp_path / "own", make_tagger(259, num_hidden_layers=1))
        student = {"from": "pretrained", "model": str(folder), "dropout": 0.0}
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
    live = build_student(config.student, reading.task, 4, reading.tokenizer, config.seed)
    teacher, cached = make_tagger(), TeacherCache.open(cache)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    examples = list(reading.select("train"))
    batch = reading.task.batch(examples, 0)
    said = []
    for example in examples:
        original = cached.by_id(example.example_id)
        ids = torch.from_numpy(original.input_ids).long()[None]
        with torch.no_grad():
            said.append(teacher(ids).logits[0, original.target_positions])
    for _ in range(2):
        mine = live(**batch.inputs).logits.flatten(0, 1)[batch.target_index]
        loss = 4.0 * functional.kl_div(
            (mine / 2.0).log_softmax(1),
            (torch.cat(said) / 2.0).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train_student(config)
    found = AutoModelForTokenClassification.from_pretrained(tmp_path / "run").state_dict()
    assert read_result(tmp_path / "run").training["steps"] == 2
    for name, expected in live.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=0.0, atol=1e-5, msg=name)


def test_a_run_measures_words_entities_and_languages(cache: Path, tmp_path: Path) -> None:
    folder = save_byte_student(tmp_path / "own", make_tagger(259))
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={"from": "pretrained", "model": str(folder)},
        losses=[
            {"name": "forward_kl"},
            {"name": "cross_entropy"},
            {"name": "hidden_mse", "layers": {-1: -1}},
        ],
        evaluation={"slices": ["language"]},
    )
    train_student(config)
    result = read_result(tmp_path / "run")
    for name in ("accuracy", "macro_f1", "entity_f1", "loss", "ece", "agreement", "kl_to_teacher"):
        assert result.metric(name) is not None, name
        assert result.metric(name, "language=sv") is not None, name
    assert set(result.details["classification_report"]) == set(TAGS)
    told = {metric["name"] for metric in result.details["teacher"]["metrics"]}
    assert "entity_f1" in told
    again = {(m.name, m.slice): m.value for m in evaluate(tmp_path / "run")}
    assert again["entity_f1", "all"] == pytest.approx(result.metric("entity_f1"))


def test_teachers_with_tokenizers_of_their_own_speak_of_the_same_words(
    cache: Path, tmp_path: Path
) -> None:
    folder = save_byte_student(tmp_path / "other", make_tagger(259))
    second = make_tag_cache(tmp_path, teacher={"model": str(folder)})
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={**BERT, "dropout": 0.0},
        further_teachers={"caches": {"bytes": {"cache": str(second)}}},
        training={
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0.0,
            "per_device_train_batch_size": 100,
        },
    )
    train_student(config)
    [line] = [line for line in read_lines(tmp_path / "run") if line["split"] == "train"]
    first, other = (value for name, value in line.items() if name.startswith("term/"))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run").eval()
    expected = dict.fromkeys((cache, second), 0.0)
    said = [TeacherCache.open(path) for path in expected]
    words = 0
    for row in said[0].split_indices("train"):
        example = said[0][int(row)]
        with torch.no_grad():
            own = model(torch.from_numpy(example.input_ids).long()[None]).logits[0]
        own = own[example.target_positions].log_softmax(1)
        words += len(own)
        for path, teacher in zip(expected, said, strict=True):
            told = teacher.by_id(example.example_id).targets.at(1.0)
            dense = torch.zeros_like(own).scatter(1, told.ids, told.log_probs)
            expected[path] += float((dense.exp() * (dense - own)).sum())
    assert first == pytest.approx(expected[cache] / words, rel=1e-4)
    assert other == pytest.approx(expected[second] / words, rel=1e-4)


def test_hidden_states_of_words_are_compared_across_tokenizers(cache: Path) -> None:
    reading = own_reading(cache, make_byte_tokenizer())
    collator = reading.collator([ForwardKL(), HiddenMSE(layers={-1: -1})])
    batch = collator(list(reading.select("test")))
    assert len(batch["hidden"]["layer.-1"]) == len(batch["feature_index"])
    assert len(batch["targets"]) == len(batch["target_index"])


def test_an_inspected_example_shows_the_tag_of_each_word(cache: Path) -> None:
    console = Console(width=140, force_terminal=False)
    with console.capture() as captured:
        inspect(cache, "s0", console)
    shown = captured.get()
    assert "p(label)" in shown and "B-PER" in shown


REAL = os.environ.get("STILLROOM_DATA")


@pytest.mark.skipif(not REAL, reason="STILLROOM_DATA is not set")
def test_treebanks_are_read_and_every_word_finds_its_tag() -> None:
    config = DataConfig(
        source="ud",
        name=["mr_ufal", "mt_mudt"],
        splits={"train": "train", "test": "test"},
        carry=["tokens", "language"],
    )
    rows = load_rows(config)
    task = TokenClassification(labels=rows.label_names)
    examples = list(task.examples(rows, make_byte_tokenizer(), config.carry))
    assert rows.label_names is not None and len(rows.label_names) == 17
    assert len(examples) == 373 + 47 + 1123 + 518
    assert sum(len(e.target_positions) for e in examples) == 2997 + 412 + 22880 + 11073
    assert {e.columns["language"] for e in examples} == {"mr", "mt"}
