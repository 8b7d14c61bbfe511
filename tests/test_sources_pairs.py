"""Sources and targets come from pairs of columns, from fields of one, and from one file of all
splits."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.config import load_config
from pipeline.errors import DataError
from pipeline.sources import DataConfig, load_rows
from stages.cache_teacher import CacheConfig
from stages.shipped import CONFIGS

REAL = os.environ.get("STILLROOM_DATA")
PAIRS = [
    {"split": "dev", "translation": {"en": "one", "de": "eins"}, "lang": "deu"},
    {"split": "test", "translation": {"en": "two", "de": "zwei"}, "lang": "deu"},
    {"split": "devtest", "translation": {"en": "three", "de": "drei"}, "lang": "deu"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("PAIRS_FOLDER", str(tmp_path))
    monkeypatch.delenv("NO_FOLDER", raising=False)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(**settings: Any) -> list[dict[str, Any]]:
    return list(load_rows(DataConfig(**settings)))


def test_fields_of_a_column_and_splits_of_one_file_are_found(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    rows = read(
        source="json",
        files="$PAIRS_FOLDER/pairs.jsonl",
        split_column="split",
        splits={"train": "dev+devtest", "test": "test"},
        columns={"source": "translation.de", "target": "translation.en", "language": "lang"},
    )
    assert [(row["split"], row["source"], row["target"]) for row in rows] == [
        ("train", "eins", "one"),
        ("train", "drei", "three"),
        ("test", "zwei", "two"),
    ]
    assert {row["language"] for row in rows} == {"deu"}


def test_a_pair_of_columns_is_canonical_and_a_source_alone_is_not(tmp_path: Path) -> None:
    both = write(tmp_path / "a.jsonl", [{"source": "eins", "target": "one"}])
    assert read(source=str(both)) == [
        {"id": "train-0", "split": "train", "source": "eins", "target": "one"}
    ]
    alone = write(tmp_path / "b.jsonl", [{"source": "the web", "text": "one"}])
    assert read(source=str(alone)) == [{"id": "train-0", "split": "train", "text": "one"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": "$NO_FOLDER/pairs.jsonl"}, r"variable \$NO_FOLDER is not set; set it"),
        (
            {"files": "$PAIRS_FOLDER/pairs.jsonl", "split_column": "splt"},
            "json: has no column 'splt'; did you mean 'split'.*; mend data.split_column",
        ),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(DataError, match=message):
        read(source="json", columns={"source": "lang"}, **settings)


@pytest.mark.skipif(not REAL, reason="STILLROOM_DATA is not set")
def test_the_shipped_configs_find_their_pairs() -> None:
    flores = load_config(CacheConfig, CONFIGS / "cache" / "flores.yaml").data
    rows = list(load_rows(flores))
    counts = Counter((row["split"], row["language"]) for row in rows)
    assert counts["train", "ne"] == 2559 + 2835
    assert counts["test", "ne"] == counts["test", "si"] == 200
    assert all(row["source"] and row["target"] for row in rows)
    papers = list(load_rows(load_config(CacheConfig, CONFIGS / "cache" / "scitldr.yaml").data))
    assert max(len(row["target"]) for row in papers if row["split"] == "test") > 1
    assert sum(row["split"] == "train" for row in papers) == 1992
