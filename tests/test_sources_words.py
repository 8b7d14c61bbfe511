"""Tagged words from any data set, and from the files of Universal Dependencies."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.sources import DataConfig, load_rows
from pipeline.sources.ud import UPOS

WORDS = [
    {"id": "a", "tokens": ["Ann", "sees", "Rome"], "tags": ["B-PER", "O", "B-LOC"]},
    {"id": "b", "tokens": ["It", "snows"], "tags": ["O", None]},
    {"id": "c", "tokens": ["Yes"], "tags": None},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.delenv("STILLROOM_DATA", raising=False)


def write_words(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in WORDS), encoding="utf-8")
    return str(path)


def write_treebank(folder: Path, name: str, ids: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "tokens": ["It", "rains"], "upos": ["PRON", "VERB"]} for i in ids]
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_label_set_of_tags_is_found_over_all_rows(tmp_path: Path) -> None:
    rows = load_rows(DataConfig(source=write_words(tmp_path / "words.jsonl"), carry=["tokens"]))
    assert rows.label_names == ["B-LOC", "B-PER", "O"]
    assert [row["tags"] for row in rows] == [[1, 2, 0], [2, None], None]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in WORDS]


def test_declared_names_and_another_column_give_the_same_tags(tmp_path: Path) -> None:
    names = ["O", "B-PER", "B-LOC"]
    feature = datasets.List(datasets.ClassLabel(names=names))
    table = datasets.Dataset.from_dict({"words": [["Ann", "runs"]], "ner": [[1, 0]]})
    table.cast_column("ner", feature).save_to_disk(tmp_path / "saved")
    config = {"source": str(tmp_path / "saved"), "columns": {"tokens": "words", "tags": "ner"}}
    rows = load_rows(DataConfig.model_validate(config))
    assert rows.label_names == names
    assert [row["tags"] for row in rows] == [[1, 0]]


def test_rows_that_do_not_keep_their_label_have_no_tags(tmp_path: Path) -> None:
    config = {"source": write_words(tmp_path / "words.jsonl"), "labelled": {"count": 1}}
    kept = [row["tags"] for row in load_rows(DataConfig.model_validate(config))]
    assert kept[2] is None and kept.count(None) == 2
    config["labelled"] = {"count": 3}
    with pytest.raises(DataError, match="only 2 ids have a label"):
        load_rows(DataConfig.model_validate(config))


def test_a_tag_outside_the_label_set_is_named(tmp_path: Path) -> None:
    config = DataConfig(source=write_words(tmp_path / "words.jsonl"), label_names=["O", "B-LOC"])
    with pytest.raises(DataError, match="row 'a' has label 'B-PER', which is not in label_names"):
        load_rows(config)


def test_treebanks_share_one_label_set_and_no_id(tmp_path: Path) -> None:
    for name in ("en_ewt.dev", "en_ewt.test", "de_gsd.dev", "de_gsd.test", "pud.de"):
        write_treebank(tmp_path / "ud_upos", name, ["1", "2"])
    config = {
        "source": "ud",
        "name": ["en_ewt", "de_gsd"],
        "files": str(tmp_path / "ud_upos"),
        "splits": {"train": "dev", "test": "test"},
        "carry": ["language"],
    }
    rows = load_rows(DataConfig.model_validate(config))
    assert rows.label_names == list(UPOS)
    read = [(row["split"], row["id"], row["language"]) for row in rows]
    assert read[:3] == [
        ("train", "en_ewt.dev/1", "en"),
        ("train", "en_ewt.dev/2", "en"),
        ("train", "de_gsd.dev/1", "de"),
    ]
    assert len(set(read)) == 8
    pud = {**config, "name": "de_pud", "splits": {"test": "test"}}
    assert [row["id"] for row in load_rows(DataConfig.model_validate(pud))] == [
        "de_pud.test/1",
        "de_pud.test/2",
    ]


def test_treebanks_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="name the treebanks by `name`"):
        load_rows(DataConfig(source="ud"))
    with pytest.raises(DataError, match=r"has no folder; .* STILLROOM_DATA"):
        load_rows(DataConfig(source="ud", name="en_ewt"))
    write_treebank(tmp_path / "ud_upos", "en_ewt.test", ["1"])
    monkeypatch.setenv("STILLROOM_DATA", str(tmp_path))
    with pytest.raises(DataError, match="no treebank 'en_ewd'; did you mean 'en_ewt'"):
        load_rows(DataConfig(source="ud", name="en_ewd"))
    with pytest.raises(DataError, match="no split 'train'"):
        load_rows(DataConfig(source="ud", name="en_ewt"))
