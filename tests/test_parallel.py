"""Pairs of sentences become one row per distinct source, and one per translation of it."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.sources import DataConfig, Rows, load_rows

PAIRS = [
    ("deu", "Guten Tag.", "Good day."),
    ("deu", "Hallo.", "Hello."),
    ("fra", "Bonjour.", "Good day."),
    ("fra", "Salut.", "Hello."),
    ("deu", "Grüß dich.", "Hello."),
]
NAMES = ["train", "validation", "test"]


def write_pairs(root: Path, pairs: Any = PAIRS, **columns: list[str]) -> str:
    rows = [{"lang": lang, "text": text, "eng": eng} for lang, text, eng in pairs]
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    file = root / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def load(file: str, unique: bool = False, **settings: Any) -> Rows:
    return load_rows(DataConfig(source="parallel", files=file, **settings), unique)


def test_a_source_stands_once_and_its_translations_bear_its_id(tmp_path: Path) -> None:
    file = write_pairs(tmp_path, split=["train"] * 5)
    sources = {row["text"]: row["id"] for row in load(file, unique=True, name="eng")}
    assert set(sources) == {"Good day.", "Hello."}
    assert len(set(sources.values())) == 2
    rows = list(load(file, carry=["language"]))
    assert Counter(row["language"] for row in rows) == {"eng": 2, "deu": 3, "fra": 2}
    english = {text: eng for _, text, eng in PAIRS} | {text: text for text in sources}
    assert all(row["id"] == sources[english[row["text"]]] for row in rows)


def test_languages_are_chosen_by_name(tmp_path: Path) -> None:
    file = write_pairs(tmp_path, split=["train"] * 5)
    rows = list(load(file, name=["fra", "deu"], carry=["language"]))
    assert [row["language"] for row in rows] == ["fra", "fra", "deu", "deu", "deu"]
    with pytest.raises(DataError, match="has no language 'fre'; did you mean 'fra'"):
        load(file, name="fre")


def test_no_source_stands_in_two_splits(tmp_path: Path) -> None:
    file = write_pairs(tmp_path, split=["train", "train", "train", "train", "test"])
    splits = {"train": "train", "test": "test"}
    held = {row["id"]: row["split"] for row in load(file, name="eng", splits=splits)}
    assert sorted(held.values()) == ["test", "train"]
    for row in load(file, splits=splits):
        assert row["split"] == held[row["id"]]


def test_without_splits_sources_are_dealt_by_their_text_alone(tmp_path: Path) -> None:
    pairs = [(lang, f"{lang} {n}", f"source {n}") for lang in ("deu", "fra") for n in range(500)]
    splits = {name: name for name in NAMES}
    dealt = {
        (row["language"], row["id"]): row["split"]
        for row in load(write_pairs(tmp_path, pairs), splits=splits, carry=["language"])
    }
    again = load(write_pairs(tmp_path, pairs[::-1]), splits=splits, carry=["language"])
    assert dealt == {(row["language"], row["id"]): row["split"] for row in again}
    assert len({(key[1], split) for key, split in dealt.items()}) == 500
    counts = Counter(dealt.values())
    assert 0.75 < counts["train"] / 1500 < 0.85
    assert min(counts["validation"], counts["test"]) > 100


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    file = write_pairs(tmp_path)
    with pytest.raises(DataError, match=r"no column 'eng_'; did you mean 'eng'.*options\.pivot"):
        load(file, options={"pivot": "eng_"})
    with pytest.raises(DataError, match="no builder is known for this ending"):
        load(str(tmp_path / "pairs.moses"))
    with pytest.raises(ConfigError, match="parallel: needs `files`"):
        load_rows(DataConfig(source="parallel"))
    with pytest.raises(ConfigError, match="`files` is the one file of pairs"):
        load_rows(DataConfig(source="parallel", files=[file]))


def test_a_known_collection_says_where_it_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STILLROOM_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"STILLROOM_DATA the folder that holds tatoeba/"):
        load_rows(DataConfig(source="tatoeba"))
    monkeypatch.setenv("STILLROOM_DATA", str(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        load_rows(DataConfig(source="tatoeba"))


@pytest.mark.skipif(not os.environ.get("STILLROOM_DATA"), reason="STILLROOM_DATA is not set")
@pytest.mark.parametrize(
    ("source", "pivot", "sources"), [("tatoeba", "eng", 17988), ("flores", "en", 17010)]
)
def test_the_collections_hold_what_their_makers_say(source: str, pivot: str, sources: int) -> None:
    names = NAMES if source == "tatoeba" else ["dev", "devtest", "test"]
    splits = dict(zip(NAMES, names, strict=True))
    config = DataConfig(source=source, name=pivot, splits=splits)
    assert len(load_rows(config)) == sources
