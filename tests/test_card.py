"""Model cards: what is known is told, what is not is called unknown, and the code in them runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from small_runs import (
    TINY,
    make_data,
    make_language_cache,
    make_student_config,
    make_topic_cache,
)

from pipeline.cache import TeacherCache
from pipeline.metrics import Metric
from pipeline.report.card import CardExport, model_card
from pipeline.runs import Result, read_result
from stages.export import export
from stages.train_student import train_student

BERT = {"from": "scratch", "architecture": "bert", **TINY}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's run, of a teacher whose card tells its licence."""
    root = tmp_path_factory.mktemp("card")
    (root / "teacher").mkdir()
    (root / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    losses = [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}]
    config = make_student_config(
        make_topic_cache(root),
        root / "small-bert",
        student=BERT,
        losses=losses,
        evaluation={"slices": ["language"]},
    )
    return train_student(config)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("language")
    return train_student(make_student_config(make_language_cache(root), root / "small-llama"))


def made_up_result(**provenance: Any) -> Result:
    """A result of a student whose provenance is told here."""
    return Result(
        name="small",
        kind="student",
        task="sequence-classification",
        config={"losses": [{"name": "forward_kl"}], "evaluation": {"split": "test"}},
        identity={"cache": "0" * 64},
        model={
            "architecture": "bert",
            "auto_class": "AutoModelForSequenceClassification",
            "parameters": 1000,
        },
        training={"steps": 3, "tokens_seen": 50, "seconds": 1.0, "device": "cpu"},
        metrics=[
            Metric("accuracy", 71.5, "%", "higher"),
            Metric("macro_f1", 70.25, "%", "higher"),
            Metric("accuracy", 50.0, "%", "higher", "language=yor_Latn"),
        ],
        details={
            "teacher": {"name": "big", "architecture": "bert", "parameters": 9000, "metrics": []},
            "provenance": provenance,
        },
    )


PUBLIC: dict[str, Any] = {
    "data": {"name": "me/topics", "hub": "me/topics", "licence": "cc-by-4.0"},
    "examples": {"train": 40, "test": 12},
    "languages": ["eng_Latn", "yor_Latn"],
    "teacher": {"hub": "you/big", "licence": "apache-2.0"},
    "student": {"hub": "you/base", "licence": None},
    "targets": {"top_k": 3, "tail_draws": 0, "temperatures": [1.0, 2.0]},
}


def test_the_hub_reads_the_card_of_a_student_made_of_public_things() -> None:
    text = model_card(made_up_result(**PUBLIC), CardExport(licence="mit"))
    data = ModelCard(text).data
    assert data.license == "mit" and data.base_model == "you/base"
    assert data.datasets == ["me/topics"] and data.language == ["eng", "yor"]
    assert data.pipeline_tag == "text-classification" and data.metrics == ["accuracy", "f1"]
    measured = {
        found.metric_type: (found.metric_value, found.dataset_type, found.dataset_split)
        for found in data.eval_results
    }
    assert measured == {
        "accuracy": (71.5, "me/topics", "test"),
        "f1": (70.25, "me/topics", "test"),
    }
    assert "| its teacher | apache-2.0 |" in text
    assert "| the checkpoint it began from | unknown |" in text
    assert "[me/topics](https://huggingface.co/datasets/me/topics)" in text


def test_further_teachers_and_their_licences_are_told() -> None:
    further = [{"name": "aunt", "hub": "you/aunt", "licence": None}]
    text = model_card(made_up_result(**PUBLIC, further_teachers=further))
    assert "Further teachers are you/aunt." in text and "| its teacher aunt | unknown |" in text


def test_what_is_not_known_is_called_unknown_and_never_guessed() -> None:
    text = model_card(made_up_result())
    data = ModelCard(text).data
    assert data.license == "unknown"
    assert data.base_model is None and data.datasets is None and data.language is None
    text = model_card(made_up_result(**PUBLIC | {"languages": ["English", "yor_Latn"]}))
    assert ModelCard(text).data.language is None


def test_a_runs_card_tells_teacher_data_losses_metrics_and_licences(run: Path) -> None:
    text = (run / "README.md").read_text(encoding="utf-8")
    result = read_result(run)
    assert "Its teacher is teacher (BertForSequenceClassification, 27,939 parameters)" in text
    assert "the teacher read json files" in text
    assert "examples: train 22, test 8" in text and "languages: en" in text
    assert "`forward_kl`: weight 0.9" in text and "`cross_entropy`: weight 0.1" in text
    assert "3 classes, exact at temperature 1, 2" in text and "learning_rate 0.01" in text
    for metric in result.metrics:
        assert f"{metric.value:.4g}" in text
    assert "| language | Accuracy |" in text
    assert "| its teacher | mit |" in text and "| what the teacher read | unknown |" in text
    assert ModelCard(text).data.language == ["en"]


def test_a_licence_in_a_config_is_told_and_changes_neither_cache_nor_examples(
    tmp_path: Path,
) -> None:
    told, silent = tmp_path / "told", tmp_path / "silent"
    digests = []
    for root, licence in ((told, "cc0-1.0"), (silent, None)):
        root.mkdir()
        data = {**make_data(tmp_path), "carry": ["text", "language"], "licence": licence}
        cache = make_topic_cache(root, data=data)
        digests.append(TeacherCache.open(cache).manifest.digest)
    assert digests[0] == digests[1]
    config = make_student_config(told / "cache", told / "run", student=BERT)
    card = (train_student(config) / "README.md").read_text(encoding="utf-8")
    assert "| what the teacher read | cc0-1.0 |" in card


def test_no_card_names_a_folder_of_this_machine(run: Path, language: Path, tmp_path: Path) -> None:
    for folder in (run, language, export(run, "int8", tmp_path / "out").folder):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert str(run.parents[1]) not in text and "/tmp" not in text


def test_an_exports_card_tells_what_it_changed_and_what_it_is_called(
    run: Path, tmp_path: Path
) -> None:
    found = export(run, "int8", tmp_path / "out", licence="mit", repository="me/tiny")
    text = (found.folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.license == "mit" and "# tiny" in text and 'load_int8("me/tiny")' in text
    changes = text.split("## What the export changed")[1].split("## ")[0]
    for old, new in zip(found.before, found.after, strict=True):
        if new.slice == "all":
            assert f"| {old.value:.4g} | {new.value:.4g} |" in changes
            assert round(new.value, 6) in [e.metric_value for e in data.eval_results]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(("small-bert", format) for format in ("transformers", "int8")),
        *(("small-llama", format) for format in ("transformers", "int8", "onnx")),
    ],
)
def test_the_code_of_a_card_opens_the_student(
    name: str,
    format: str,
    run: Path,
    language: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason='pip install "stillroom[onnx]"')
    folder = export(run if name == "small-bert" else language, format, tmp_path / name).folder
    text = (folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["tokenizer"].pad_token_id is not None
    if format == "onnx":
        assert found["outputs"][0].shape[0] == 1
    else:
        given = found["tokenizer"]("a text", return_tensors="pt")
        with torch.inference_mode():
            assert found["model"](given["input_ids"]).logits.isfinite().all()
