"""Exported students: each form is opened as its user opens it and says what the run says."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_runs import TINY, make_language_cache, make_student_config, make_topic_cache
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from pipeline.errors import StillroomError
from pipeline.export import load_int8
from pipeline.runs import Result, read_result
from stages.export import export, print_export
from stages.train_student import train_student

BAG = {"from": "scratch", "architecture": "hashed-bag", "tokenizer": {"buckets": 512}}
BERT = {"from": "scratch", "architecture": "bert", **TINY}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small language model."""
    root = tmp_path_factory.mktemp("language")
    return train_student(make_student_config(make_language_cache(root), root / "small-llama"))


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of two classifiers: a transformer and a bag of n-grams."""
    root = tmp_path_factory.mktemp("topics")
    cache = make_topic_cache(root)
    slices: dict[str, Any] = {"evaluation": {"slices": ["language"]}}
    configs = {
        name: make_student_config(cache, root / name, student=origin, **slices)
        for name, origin in {"bert": BERT, "bag": BAG}.items()
    }
    return {name: train_student(config) for name, config in configs.items()}


def names_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def classify(model: Any, folder: Path) -> torch.Tensor:
    """Logits of a text by a model with the tokenizer of its folder."""
    given = AutoTokenizer.from_pretrained(folder)("the still room", return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = model(given["input_ids"], given["attention_mask"]).logits
    return logits


def test_a_transformers_folder_holds_what_is_deployed_and_nothing_else(language: Path) -> None:
    found = export(language)
    assert found.folder == language / "exports" / "transformers"
    assert names_in(found.folder) == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("config.json", "model.safetensors"):
        assert (found.folder / name).read_bytes() == (language / name).read_bytes()
    assert found.bytes_before == found.bytes_after and not found.after
    ids = torch.tensor([[5, 6, 7]])
    one, other = (AutoModelForCausalLM.from_pretrained(f) for f in (language, found.folder))
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_a_folder_in_half_precision_is_half_as_large_and_measured_in_it(language: Path) -> None:
    found = export(language, dtype="bfloat16")
    assert found.folder == language / "exports" / "transformers-bfloat16"
    assert 0.45 < found.bytes_after / found.bytes_before < 0.6
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert model.dtype == torch.bfloat16
    assert [m.name for m in found.after] == [m.name for m in found.before]
    by_name = {m.name: m.value for m in found.after}
    loss = read_result(language).metric("loss")
    assert by_name["loss"] != loss and by_name["loss"] == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("name", ["language", "bert", "bag"])
def test_an_int8_student_is_measured_as_it_was_saved(
    name: str, language: Path, topics: dict[str, Path]
) -> None:
    run = language if name == "language" else topics[name]
    found = export(run, "int8")
    files = names_in(found.folder)
    assert "int8.safetensors" in files
    assert {Path(file).suffix for file in files} == {".safetensors", ".json", ".md"}  # no pickle
    assert found.bytes_after < 0.45 * found.bytes_before
    result = read_result(run)
    for before, after in zip(found.before, found.after, strict=True):
        assert (before.name, before.slice) == (after.name, after.slice)
        assert before.value == pytest.approx(result.metric(before.name, before.slice), rel=1e-4)
    loss = {m.name: m.value for m in found.after if m.slice == "all"}["loss"]
    assert loss != result.metric("loss") and loss == pytest.approx(result.metric("loss"), rel=0.02)


def test_an_int8_classifier_says_what_the_run_says(topics: dict[str, Path], tmp_path: Path) -> None:
    for name, run in topics.items():
        folder = export(run, "int8", tmp_path / name).folder
        plain = AutoModelForSequenceClassification.from_pretrained(run)
        found, expected = classify(load_int8(folder), folder), classify(plain, run)
        assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))


def test_what_an_export_lost_is_printed_metric_by_metric(
    topics: dict[str, Path], tmp_path: Path
) -> None:
    found = export(topics["bert"], "int8", tmp_path / "out")
    shown = StringIO()
    print_export(found, Console(width=120, file=shown))
    text = shown.getvalue()
    assert "weights" in text and "MB" in text and "int8: " in text
    for metric in read_result(topics["bert"]).metrics:
        row = next(
            line for line in text.splitlines() if metric.name in line and metric.slice in line
        )
        assert f"{metric.value:.4g}" in row


def test_no_file_of_an_export_names_a_folder_of_this_machine(
    language: Path, topics: dict[str, Path], tmp_path: Path
) -> None:
    root = str(tmp_path.parent)
    for run in (language, *topics.values()):
        for name in ("transformers", "int8"):
            folder = export(run, name, tmp_path / f"{run.name}-{name}").folder
            for file in folder.rglob("*"):
                assert root not in file.read_bytes().decode(errors="replace"), file


def test_a_folder_that_holds_files_is_left_alone(language: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(StillroomError, match="holds files already"):
        export(language, output=tmp_path)
    assert names_in(tmp_path) == {"mine.txt"}


def test_an_export_that_fails_leaves_nothing(language: Path, tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match="validation"):
        export(language, "int8", tmp_path / "out", split="validation")
    assert not list(tmp_path.iterdir())


def test_unknown_formats_and_what_is_no_student_are_refused(language: Path, tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match="did you mean 'int8'"):
        export(language, "int9")
    with pytest.raises(StillroomError, match="did you mean 'bfloat16'"):
        export(language, dtype="bfloat")
    with pytest.raises(StillroomError, match="leave it out"):
        export(language, "int8", dtype="bfloat16")
    with pytest.raises(StillroomError, match="no such run"):
        export(tmp_path / "nowhere")
    (tmp_path / "teacher").mkdir()
    raw = json.loads((language / "result.json").read_text(encoding="utf-8"))
    raw["kind"] = "teacher"
    (tmp_path / "teacher" / "result.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(StillroomError, match="is a teacher"):
        export(tmp_path / "teacher")
    assert isinstance(read_result(language), Result)
