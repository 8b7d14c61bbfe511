"""What a student reads and what the teacher said belong together, or the student is refused."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_examples import make_draft, write_cache
from small_runs import make_student_config, make_topic_cache
from small_teachers import TOPICS, make_bert, make_rows, make_tokenizer, save_teacher, write_rows
from small_words import TAGS, make_sentences, make_tag_cache

from pipeline.cache import TeacherCache
from pipeline.errors import MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.reading import Reading, open_reading
from pipeline.sources import DataConfig
from pipeline.student import HashedNgramTokenizer
from pipeline.tasks import TASKS
from stages.train_student import train_student


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_topic_cache(tmp_path_factory.mktemp("topics"))


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tag_cache(tmp_path_factory.mktemp("tags"))


def make_plain(said: CachedExample) -> Example:
    """Without what the teacher said."""
    return Example(**{field.name: getattr(said, field.name) for field in fields(Example)})


def read(cache: Path, rows: list[dict[str, Any]], folder: Path, **data: Any) -> Reading:
    """The cache with other rows of its ids."""
    file = write_rows(folder / "own.jsonl", rows)
    settings = {"source": str(file), "carry": ["language"], **data}
    inputs = DataConfig.model_validate(settings)
    return open_reading(TeacherCache.open(cache), None, inputs, "the-student")


def test_a_label_that_an_id_has_here_and_not_in_the_cache_is_refused(
    topics: Path, tmp_path: Path
) -> None:
    rows = make_rows(12)
    rows[5]["label"] = TOPICS[(TOPICS.index(rows[5]["label"]) + 1) % 3]
    train = read(topics, rows, tmp_path, label_names=TOPICS).select("train")
    assert train[4].example_id == "row 4"
    with pytest.raises(MismatchError, match=r"'row 5': has label 0, the cached one 2; choose"):
        train[5]


def test_an_id_without_a_label_here_is_joined(topics: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": None} if row["id"] == "row 5" else row for row in make_rows(12)]
    train = read(topics, rows, tmp_path, label_names=TOPICS).select("train")
    assert train[5].label_ids.tolist() == [-100]


def test_ids_that_number_other_rows_are_noticed_by_their_labels(
    topics: Path, tmp_path: Path
) -> None:
    rows = [{**row, "id": f"row {n}"} for n, row in enumerate(make_rows(13)[1:])]
    train = read(topics, rows, tmp_path, label_names=TOPICS).select("train")
    with pytest.raises(MismatchError, match="'row 0': has label"):
        train[0]


def test_other_tags_and_other_words_are_refused(tags: Path, tmp_path: Path) -> None:
    cached = list(TeacherCache.open(tags).ids("train"))
    rows = [row for row in make_sentences(30) if row["id"] in cached]
    place = next(n for n, row in enumerate(rows) if row["tags"])
    assert len(read(tags, rows, tmp_path, label_names=TAGS).select("train")[place].targets)
    other_tags = json.loads(json.dumps(rows))
    other_tags[place]["tags"][0] = next(t for t in TAGS if t != rows[place]["tags"][0])
    with pytest.raises(MismatchError, match=r"has label \d, the cached one \d"):
        read(tags, other_tags, tmp_path, label_names=TAGS).select("train")[place]
    other_words = json.loads(json.dumps(rows))
    other_words[place]["tokens"][0] = "zq"
    carried = {"carry": ["tokens", "language"], "label_names": TAGS}
    with pytest.raises(MismatchError, match="has other words than the cached one"):
        read(tags, other_words, tmp_path, **carried).select("train")[place]


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_tag_that_is_not_where_a_word_begins_is_refused(tags: Path, shift: int) -> None:
    task = TASKS["token-classification"].model_validate({"labels": TAGS})
    cache = TeacherCache.open(tags)
    examples = [make_plain(cache[row]) for row in range(6)]
    assert len(task.batch(examples, 0).target_index)
    lengths = examples[3].segment_lengths.copy()
    lengths[1 if shift > 0 else -2] += 1
    lengths[-1 if shift > 0 else 1] -= 1
    examples[3] = replace(examples[3], segment_lengths=lengths.clip(min=0))
    with pytest.raises(MismatchError, match=f"{examples[3].example_id!r}: has a target that"):
        task.batch(examples, 0)


def test_a_number_that_an_id_has_here_and_not_in_the_cache_is_refused() -> None:
    task = TASKS["sequence-regression"].model_validate({"outputs": ["score"]})
    example = _scored(0.5)
    with pytest.raises(MismatchError, match=r"has the numbers \[0\.25\], the cached one \[0\.5\]"):
        task.align(_scored(0.25), example, None, None)


def _scored(score: float) -> Example:
    zero = np.zeros(1, dtype=np.int32)
    return Example("a", zero, zero + 1, zero, zero, {"score": score})


def test_a_tokenizer_that_is_not_the_caches_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, make_draft(3))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(MismatchError, match=r"is tokenizer .*…, but the cache was made with token"):
        open_reading(TeacherCache.open(tmp_path), None, None, "the-student")


def test_a_student_with_the_labels_in_another_order_is_refused(
    topics: Path, tmp_path: Path
) -> None:
    backwards = save_teacher(tmp_path / "student", make_bert(TOPICS[::-1]))
    bert = {"from": "pretrained", "model": str(backwards)}
    config = make_student_config(topics, tmp_path / "run", student=bert)
    with pytest.raises(MismatchError, match="its labels are travel, sports, science, those"):
        train_student(config)


def test_a_student_with_another_tokenizer_reads_the_labels_that_the_cache_carries(
    topics: Path,
) -> None:
    reading = open_reading(
        TeacherCache.open(topics), HashedNgramTokenizer(buckets=64), None, "the-student"
    )
    assert [e.label_ids.tolist() for e in (reading.select("train")[n] for n in range(3))] == [
        TeacherCache.open(topics)[n].label_ids.tolist() for n in range(3)
    ]
