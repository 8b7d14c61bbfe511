"""What an example without an answer is to students, and to what a cache grows into."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, make_data, make_student_config, make_topic_cache
from small_teachers import (
    TOPICS,
    make_bert,
    make_rows,
    make_tokenizer,
    save_teacher,
    write_rows,
)
from transformers import PreTrainedModel

from pipeline.cache import TeacherCache
from pipeline.cache.gaps import unasked
from pipeline.config import load_config
from pipeline.errors import MismatchError
from pipeline.examples import CachedExample
from pipeline.reading import open_reading
from pipeline.runs import read_result
from pipeline.sources import DataConfig
from pipeline.student import HashedNgramTokenizer
from pipeline.tasks.sequence_classification import SequenceClassification
from stages.add_signal import add_signal
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.extend import extend
from stages.train_student import train_student

GAP = "row 13"
TRAIN = [row for row in range(22) if row != 13]  # of the 22 rows in make_data's first file
BAG = {"from": "scratch", "architecture": "hashed-bag", "hidden_size": 8}
BAG |= {"tokenizer": {"buckets": 64}}
BERT = {"from": "scratch", "architecture": "bert", **TINY}


def mark(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with an exclamation mark in one of them."""
    return [{**row, "text": "!" + row["text"]} if row["id"] == GAP else row for row in rows]


def infect(model: PreTrainedModel) -> PreTrainedModel:
    """A teacher for whom an exclamation mark is not a number."""
    with torch.no_grad():
        token = make_tokenizer().convert_tokens_to_ids("!")
        model.get_input_embeddings().weight[token] = torch.nan
    return model


def make_gapped(root: Path, **changes: Any) -> Path:
    """A classifier's cache without an answer to one row."""
    make_topic_cache(root, data={**make_data(root), "carry": ["text", "language"]})
    write_rows(root / "train.jsonl", mark(make_rows(30))[:22])
    save_teacher(root / "teacher", infect(make_bert()))
    config = read_config(root / "cache", output=str(root / "gapped"), on_error="skip", **changes)
    return cache_teacher(config, progress=False)


def read_config(cache: Path, **changes: Any) -> CacheConfig:
    """That of a cache, changed at its top."""
    config = load_config(CacheConfig, cache / "config.yaml")
    return CacheConfig.model_validate(config.model_dump() | changes)


@pytest.fixture(scope="module")
def gapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_gapped(tmp_path_factory.mktemp("gapped"))
    assert set(TeacherCache.open(path).skipped) == {GAP}
    return path


def test_a_student_with_texts_or_tokens_of_its_own_passes_over_the_gap(
    tmp_path: Path, gapped: Path
) -> None:
    cache, bag = TeacherCache.open(gapped), HashedNgramTokenizer(buckets=64)
    rows = [{**row, "text": row["text"][::-1]} for row in make_rows(30)]
    files = {"train": rows[:22], "test": rows[22:]}
    named = {name: str(write_rows(tmp_path / f"{name}.jsonl", r)) for name, r in files.items()}
    splits = {"train": "train", "test": "test"}
    inputs = DataConfig(source="json", files=named, splits=splits, label_names=TOPICS)
    for asked in (None, inputs):
        train = open_reading(cache, bag, asked, "the student").select("train")
        assert len(train) == len(TRAIN)
        for place, row in enumerate(TRAIN):
            found = train[place]
            assert isinstance(found, CachedExample) and found.example_id == f"row {row}"
            assert found.targets.logits.equal(cache[row].targets.logits)
    own = {"student": BAG, "inputs": inputs.model_dump()}
    run = train_student(make_student_config(gapped, tmp_path / "run", **own))
    assert read_result(run).training["examples_seen"] == 2 * len(TRAIN)


def test_a_student_of_two_teachers_passes_over_the_gaps_of_both(
    tmp_path: Path, gapped: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", mark(make_rows(30))[:22])
    first = read_config(gapped, output=str(tmp_path / "first"))
    save_teacher(tmp_path / "teacher", make_bert())
    teacher = first.teacher.model_copy(update={"model": str(tmp_path / "teacher")})
    healthy = cache_teacher(first.model_copy(update={"teacher": teacher}), progress=False)
    assert not TeacherCache.open(healthy).skipped
    caches = {"caches": {"sick": {"cache": str(gapped)}}}
    two = {"student": BERT, "further_teachers": caches}
    run = train_student(make_student_config(healthy, tmp_path / "run", **two))
    assert read_result(run).training["examples_seen"] == 2 * len(TRAIN)


def test_a_gap_is_no_new_example(
    tmp_path: Path, gapped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = extend(gapped, read_config(gapped), tmp_path / "same")
    assert len(same) == 30 and set(same.skipped) == {GAP}
    told = "nothing is new; 1 without an answer, which the teacher is not asked again"
    assert told in capsys.readouterr().out
    rows = [*mark(make_rows(30))[:22], {**make_rows(1)[0], "id": "row 99"}]
    data = read_config(gapped).data
    files = {**(data.files or {}), "train": str(write_rows(tmp_path / "more.jsonl", rows))}
    config = read_config(gapped, data=data.model_copy(update={"files": files}))
    grown = extend(gapped, config, tmp_path / "more", progress=False)
    assert len(grown) == 31 and set(grown.skipped) == {GAP} and "row 99" in grown


def test_a_changed_example_takes_the_place_of_its_gap(tmp_path: Path, gapped: Path) -> None:
    rows = make_rows(30)[:22]  # without the exclamation mark
    data = read_config(gapped).data
    files = {**(data.files or {}), "train": str(write_rows(tmp_path / "mended.jsonl", rows))}
    config = read_config(gapped, data=data.model_copy(update={"files": files}))
    with pytest.raises(MismatchError, match=f"holds example '{GAP}' with other content"):
        extend(gapped, config, tmp_path / "refused", progress=False)
    mended = extend(gapped, config, tmp_path / "mended", replace=True, progress=False)
    assert len(mended) == 30 and not mended.skipped
    assert len(mended.by_id(GAP).targets) == 1


def test_what_is_added_to_a_cache_with_a_gap_has_it_too(tmp_path: Path, gapped: Path) -> None:
    more = ["hidden.layers=[1]", "targets.temperatures=[1,4]"]
    view = add_signal(gapped, tmp_path / "more", more, progress=False)
    config = read_config(gapped, output=str(tmp_path / "whole"))
    targets = config.targets.model_copy(update={"temperatures": (1.0, 2.0, 4.0)})
    hidden = config.hidden.model_copy(update={"layers": (1,)})
    config = config.model_copy(update={"targets": targets, "hidden": hidden})
    whole = TeacherCache.open(cache_teacher(config, progress=False))
    assert set(view.skipped) == set(whole.skipped) == {GAP}
    assert len(view[13].targets) == len(view[13].hidden["layer.1"]) == 0
    for row in TRAIN:
        found, expected = view[row], whole[row]
        torch.testing.assert_close(found.targets.logsumexp, expected.targets.logsumexp)
        torch.testing.assert_close(found.hidden["layer.1"], expected.hidden["layer.1"])


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_an_example_without_targets_leaves_those_of_its_batch_where_they_are(gap: int) -> None:
    task = SequenceClassification(labels=TOPICS)
    rows = [{"id": row["id"], "text": row["text"], "label": 0} for row in make_rows(3)]
    examples = list(task.examples(rows, make_tokenizer(), []))
    examples[gap] = unasked(examples[gap])
    assert task.batch(examples, 0).target_index.tolist() == [n for n in range(3) if n != gap]
