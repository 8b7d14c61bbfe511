"""Sentence encoders deployed: the vectors of the run, whoever opens the folder."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import TINY, make_language_cache, make_student_config, make_topic_cache
from test_sentence_embeddings import BAG, make_cache, make_encoder, make_student
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import ModelError
from pipeline.export import GraphStudent, load_int8
from pipeline.sentences import SentenceHead
from pipeline.tasks.base import mean_states
from stages.export import export
from stages.train_student import train_student

TEXTS = ["the still room holds many bottles", "one teacher"]
STUDENTS: dict[str, dict[str, Any]] = {
    "bert": {"from": "scratch", "architecture": "bert", **TINY},  # half as wide as its teacher
    "bag": {**BAG, "tokenizer": {"buckets": 512}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow transformer and a bag of n-grams that learned the vectors of one encoder."""
    root = tmp_path_factory.mktemp("vectors")
    make_encoder(root / "teacher")
    cache = make_cache(root)
    return {
        name: train_student(
            make_student(
                cache,
                root / name,
                student=student,
                evaluation={},
                training={"num_train_epochs": 2, "learning_rate": 1e-3},
            )
        )
        for name, student in STUDENTS.items()
    }


def tokenize(folder: Path) -> Any:
    """The texts as the task reads them, whose max_length is 48."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS, padding=True, truncation=True, max_length=48, return_tensors="pt")


def embed(folder: Path, model: Any = None) -> Tensor:
    """The vectors of the texts by the parts that lie in a folder."""
    model = model or AutoModel.from_pretrained(folder)
    given = tokenize(folder)
    with torch.inference_mode():
        states = model.eval()(given["input_ids"], given["attention_mask"]).last_hidden_state
        vectors: Tensor = SentenceHead.read(str(folder))(
            mean_states(states, given["attention_mask"].bool())
        )
    return vectors


@pytest.mark.parametrize("name", STUDENTS)
def test_a_folder_of_sentence_transformers_holds_the_runs_vectors(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    found = export(runs[name], "sentence-transformers", tmp_path / "out")
    assert torch.equal(embed(found.folder), embed(runs[name]))
    assert [m.value for m in found.after] == pytest.approx([m.value for m in found.before])
    plain = export(runs[name], output=tmp_path / "plain").folder
    assert torch.equal(embed(plain), embed(runs[name]))


@pytest.mark.parametrize("name", STUDENTS)
def test_sentence_transformers_gives_the_runs_vectors(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    package = pytest.importorskip(
        "sentence_transformers", reason="pip install sentence-transformers"
    )
    folder = export(runs[name], "sentence-transformers", tmp_path / "out").folder
    vectors = package.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, embed(runs[name]).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_vectors_in_int8_are_near_the_runs(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    found = export(runs[name], "int8", tmp_path / "out")
    assert found.bytes_after < 0.5 * found.bytes_before and found.after
    assert not (found.folder / "model.safetensors").exists()
    near = torch.cosine_similarity(embed(found.folder, load_int8(found.folder)), embed(runs[name]))
    assert near.min() > 0.99


def test_a_graph_gives_the_vectors_themselves(runs: dict[str, Path], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='pip install "stillroom[onnx]"')
    found = export(runs["bert"], "onnx", tmp_path / "out")
    [note] = found.notes
    assert float(note.rpartition(" ")[2]) < 1e-5
    graph = GraphStudent(found.folder, None)
    given = tokenize(found.folder)
    vectors = graph(**{k: given[k] for k in ("input_ids", "attention_mask")}).sentence_embedding
    torch.testing.assert_close(vectors, embed(runs["bert"]), rtol=1e-4, atol=1e-5)


def test_the_encoder_of_a_classifier_is_exported_by_the_mean_of_its_states(
    tmp_path: Path,
) -> None:
    student = STUDENTS["bert"]
    run = train_student(
        make_student_config(make_topic_cache(tmp_path), tmp_path / "run", student=student)
    )
    found = export(run, "sentence-transformers")
    assert "not trained to be a vector" in found.notes[0] and not found.after
    model = AutoModelForSequenceClassification.from_pretrained(run)
    given = tokenize(run)
    with torch.inference_mode():
        answer = model(given["input_ids"], given["attention_mask"], output_hidden_states=True)
    expected = mean_states(answer.hidden_states[-1], given["attention_mask"].bool())
    torch.testing.assert_close(embed(found.folder), expected)


def test_what_has_no_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "language").mkdir()
    (tmp_path / "topics").mkdir()
    language = make_student_config(
        make_language_cache(tmp_path / "language"), tmp_path / "llama", training={"max_steps": 1}
    )
    bag = make_student_config(
        make_topic_cache(tmp_path / "topics"), tmp_path / "bag", student=STUDENTS["bag"]
    )
    for config in (language, bag):
        with pytest.raises(ModelError, match="has no encoder by itself"):
            export(train_student(config), "sentence-transformers")


@pytest.mark.parametrize("format", ["transformers", "int8"])
def test_a_card_opens_a_sentence_encoder(
    format: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "transformers":
        pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    folder = export(runs["bert"], format, tmp_path / "bert").folder
    text = (folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert ("vectors" in found) == (format == "transformers")
