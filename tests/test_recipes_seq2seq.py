"""The shipped recipe of translation from end to end by the command line, on made-up pairs."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from small_translators import make_pairs
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from pipeline.cache import TeacherCache
from pipeline.runs import read_result
from stages.cli import app


def run_command(*arguments: str, **settings: object) -> str:
    options = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    given = [part for option in options for part in ("--set", option)]
    result = CliRunner().invoke(app, [*arguments, *given], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_flores(folder: Path) -> None:
    """Three languages in the form of FLORES v1, enough of each split."""
    folder.mkdir()
    with gzip.open(folder / "flores_v1.jsonl.gz", "wt", encoding="utf-8") as file:
        for language in ("ne", "si", "km"):
            tests = 0 if language == "km" else 40  # as in the real one
            splits = ["dev"] * 60 + ["devtest"] * 40 + ["test"] * tests
            for split, pair in zip(splits, make_pairs(len(splits)), strict=True):
                row = {"lang": language, "split": split, "text": pair["de"], "en": pair["en"]}
                file.write(json.dumps(row) + "\n")


def test_the_translation_recipe_runs_from_pairs_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flores(tmp_path / "flores_v1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLROOM_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    few = "{train: dev+devtest, test: 'test[:20]+test[-20:]'}"
    run_command(
        "train-teacher",
        "flores",
        task__evaluate="null",
        data__splits=few,
        model__hidden_size=32,
        tokenizer__vocab_size=300,
        training__max_steps=30,
        training__warmup_steps=5,
    )
    run_command(
        "cache-teacher",
        "flores-generated",
        task__evaluate="null",
        data__splits=few,
        task__generation="{num_beams: 2, max_new_tokens: 8}",
    )
    cache = TeacherCache.open(Path("data/caches/flores-generated"))
    assert len(cache.split_indices("train")) == 200
    assert cache[0].columns["language"] == "ne"
    assert isinstance(cache[0].columns["generated"], str)
    run_command(
        "train-student",
        "flores-sequences",
        student__hidden_size=32,
        training__max_steps=20,
        training__warmup_steps=5,
    )
    run_command("compare", "runs/flores", "--output", "runs/flores/report.html")
    assert AutoModelForSeq2SeqLM.from_pretrained("runs/flores/sequences").config.num_layers == 1
    result = read_result(Path("runs/flores/sequences"))
    assert {metric.slice for metric in result.metrics} == {"all", "language=ne", "language=si"}
    assert Path("runs/flores/report.html").is_file()
