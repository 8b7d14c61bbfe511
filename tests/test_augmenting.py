"""Changed copies of training texts: whose they are, how much is changed, and that they stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import make_data, make_student_config, make_topic_cache
from small_teachers import WORDS

from pipeline.cache import TeacherCache
from pipeline.config import parse_config
from pipeline.errors import DataError
from pipeline.runs import read_result
from pipeline.sources import Augmentation, DataConfig, load_rows
from pipeline.sources.augmenting import augment, list_words
from pipeline.targets import UNLABELLED
from stages.train_student import train_student


def load(root: Path, **settings: Any) -> list[dict[str, Any]]:
    config = {**make_data(root), "augment": {"copies": 2, **settings}}
    return list(load_rows(parse_config(DataConfig, config, "data")))


def test_a_training_row_is_followed_by_its_copies_without_label(tmp_path: Path) -> None:
    rows = load(tmp_path)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["id"] for row in train[:4]] == ["row 0", "row 0~1", "row 0~2", "row 1"]
    assert train[0]["label"] is not None
    assert {row["label"] for row in train if "~" in row["id"]} == {None}
    assert not any("~" in row["id"] for row in rows if row["split"] == "test")
    config = parse_config(DataConfig, {**make_data(tmp_path), "augment": {"copies": 2}}, "data")
    assert len(load_rows(config)) == len(rows) == 3 * 22 + 8


def test_copies_are_the_same_from_run_to_run_and_others_by_another_seed(tmp_path: Path) -> None:
    once, again, other = load(tmp_path), load(tmp_path), load(tmp_path, seed=1)
    assert once == again
    assert any(a["text"] != b["text"] for a, b in zip(once, other, strict=True))


@given(st.text(st.sampled_from("ab "), min_size=1).filter(str.strip), st.integers(0, 99))
def test_nothing_is_changed_where_nothing_shall_be(text: str, seed: int) -> None:
    settings = Augmentation(copies=1, replace=0.0, drop=0.0, swap=0.0, seed=seed)
    row = {"id": "a", "split": "train", "text": text}
    _, copy = augment([row], settings, np.array(["x"], dtype=object))
    assert copy["text"].split() == text.split()


def test_words_are_changed_as_often_as_asked() -> None:
    words = [f"w{number}" for number in range(4000)]
    row = {"id": "a", "split": "train", "text": " ".join(words)}
    settings = Augmentation(copies=1, replace=0.2, drop=0.1, swap=0.0)
    _, copy = augment([row], settings, np.array(["new"], dtype=object))
    found = copy["text"].split()
    assert abs(len(found) / 4000 - 0.9) < 0.02
    assert abs(found.count("new") / len(found) - 0.2) < 0.03
    kept = [word for word in found if word != "new"]
    assert kept == [word for word in words if word in set(kept)]  # in their order


def test_a_script_without_spaces_is_changed_by_characters() -> None:
    row = {"id": "a", "split": "train", "text": "天地玄黃宇宙洪荒" * 20}
    settings = Augmentation(copies=1, replace=0.5, drop=0.0, swap=0.0)
    words = list_words([row])
    assert set(words) == set("天地玄黃宇宙洪荒")
    _, copy = augment([row], settings, words)
    assert len(copy["text"]) == len(row["text"])
    assert " " not in copy["text"]
    assert copy["text"] != row["text"]


def test_replacements_are_words_of_the_training_texts(tmp_path: Path) -> None:
    for row in load(tmp_path, replace=1.0, drop=0.0):
        assert set(row["text"].split()) <= set(WORDS)


def test_rows_without_text_cannot_be_augmented() -> None:
    with pytest.raises(DataError, match=r"data\.augment: the training rows have no text"):
        list_words([{"id": "a", "split": "train", "tokens": ["b"]}])


def test_the_teacher_judges_copies_and_students_learn_from_them(tmp_path: Path) -> None:
    data = {**make_data(tmp_path), "carry": ["text", "language"], "augment": {"copies": 3}}
    cache = TeacherCache.open(make_topic_cache(tmp_path, data=data))
    assert len(cache.split_indices("train")) == 4 * 22
    assert len(cache.split_indices("test")) == 8
    copy = cache.by_id("row 5~1")
    assert copy.label_ids.tolist() == [UNLABELLED]
    assert copy.columns["text"] != cache.by_id("row 5").columns["text"]
    config = make_student_config(
        cache.path,
        tmp_path / "run",
        student={
            "from": "scratch",
            "architecture": "hashed-bag",
            "hidden_size": 8,
            "tokenizer": {"buckets": 512},
        },
        losses=[{"name": "forward_kl"}, {"name": "cross_entropy"}],
        training={"num_train_epochs": 1},
    )
    assert read_result(train_student(config)).training["examples_seen"] == 4 * 22
