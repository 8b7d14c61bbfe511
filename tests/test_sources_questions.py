"""Questions with their contexts and answers, from any data set and from XQuAD's files."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from pipeline.errors import DataError
from pipeline.sources import DataConfig, load_rows

QUESTIONS = [
    {
        "id": f"q{number}",
        "question": "Who?",
        "context": "Ann runs.",
        "answers": {"text": ["Ann"] if number else [], "answer_start": [0] if number else []},
    }
    for number in range(4)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.delenv("STILLROOM_DATA", raising=False)


def write_questions(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return str(path)


def write_articles(folder: Path, languages: list[str]) -> str:
    """Nine articles of one paragraph and one question each."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in languages:
        lines = [
            {"type": "context", "ctx": f"{n}-0", "context": f"{language} {n} is."} for n in range(9)
        ] + [
            {
                "type": "qa",
                "id": f"x{n}",
                "ctx": f"{n}-0",
                "title": f"article {n}",
                "question": "Which?",
                "answer": str(n),
                "start": 3,
            }
            for n in range(9)
        ]
        with gzip.open(folder / f"xquad.{language}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return str(folder)


def test_answers_are_read_as_squad_has_them(tmp_path: Path) -> None:
    rows = list(load_rows(DataConfig(source=write_questions(tmp_path / "q.jsonl"))))
    assert rows[1] == {**QUESTIONS[1], "split": "train"}


def test_rows_that_do_not_keep_their_label_have_no_answers(tmp_path: Path) -> None:
    config = {"source": write_questions(tmp_path / "q.jsonl"), "labelled": {"count": 2}}
    rows = load_rows(DataConfig.model_validate(config))
    assert sum(row["answers"] is not None for row in rows) == 2
    assert next(iter(rows))["answers"] is None  # it never had one
    config["labelled"] = {"count": 4}
    with pytest.raises(DataError, match="only 3 ids have a label"):
        load_rows(DataConfig.model_validate(config))


def test_articles_are_dealt_to_the_same_splits_in_every_language(tmp_path: Path) -> None:
    config = {
        "source": "xquad",
        "files": write_articles(tmp_path / "xquad", ["en", "th"]),
        "splits": {name: name for name in ("train", "validation", "test")},
        "carry": ["title"],
    }
    rows = list(load_rows(DataConfig.model_validate(config)))
    assert {row["id"] for row in rows} == {f"{la}/x{n}" for la in ("en", "th") for n in range(9)}
    dealt = {(row["title"], row["split"]) for row in rows}
    assert len(dealt) == 9
    assert {title for title, split in dealt if split == "test"} == {"article 6", "article 7"}
    for row in rows:
        [text], [start] = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text


def test_languages_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"has no folder; .* STILLROOM_DATA"):
        load_rows(DataConfig(source="xquad"))
    write_articles(tmp_path / "xquad", ["en"])
    monkeypatch.setenv("STILLROOM_DATA", str(tmp_path))
    assert len(load_rows(DataConfig(source="xquad"))) == 6
    with pytest.raises(DataError, match="has no language 'eng'; did you mean 'en'"):
        load_rows(DataConfig(source="xquad", name="eng"))
