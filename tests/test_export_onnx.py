"""Students as ONNX graphs: any number of rows and tokens, the answers of the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import TINY, make_language_cache, make_student_config, make_topic_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from pipeline.errors import ConfigError, ModelError
from pipeline.export import GraphStudent, save_onnx
from pipeline.runs import read_result
from pipeline.student.bag import HashedBagForSequenceClassification
from stages.export import Export, export
from stages.train_student import train_student

NEEDED = 'pip install "stillroom[onnx]"'


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """A language model, a transformer that classifies and a bag of n-grams."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=NEEDED)
    roots = [tmp_path_factory.mktemp(name) for name in ("language", "topics")]
    language, topics = make_language_cache(roots[0]), make_topic_cache(roots[1])
    origins: dict[str, dict[str, Any]] = {
        "llama": {"architecture": "llama", **TINY},
        "bert": {"architecture": "bert", **TINY},
        "bag": {"architecture": "hashed-bag", "tokenizer": {"buckets": 512}},
    }
    found = {}
    for name, origin in origins.items():
        cache = language if name == "llama" else topics
        config = make_student_config(
            cache, cache.parent / name, student={"from": "scratch", **origin}
        )
        found[name] = export(train_student(config), "onnx")
    return found


@pytest.mark.parametrize("name", ["llama", "bert", "bag"])
def test_a_graph_is_measured_as_the_run(exports: dict[str, Export], name: str) -> None:
    found = exports[name]
    files = {file.name for file in found.folder.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer_config.json"} <= files
    assert not any("safetensors" in file for file in files)
    result = read_result(found.folder.parents[1])
    assert {m.name for m in found.after} >= {"loss", "accuracy", "agreement", "kl_to_teacher"}
    for metric in found.after:
        expected = result.metric(metric.name, metric.slice)
        assert metric.value == pytest.approx(expected, rel=1e-3, abs=1e-4), metric.name
    [note] = found.notes
    assert float(note.rpartition(" ")[2]) < 1e-4  # the largest difference of logits


def test_packed_documents_stay_apart_in_the_graph_of_a_language_model(
    exports: dict[str, Export],
) -> None:
    folder = exports["llama"].folder
    model = AutoModelForCausalLM.from_pretrained(folder.parents[1])
    graph = GraphStudent(folder, model.config)
    one, other = torch.tensor([[5, 9, 2]]), torch.tensor([[7, 3, 8, 1]])
    packed = {
        "input_ids": torch.cat([one, other], 1),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    found = graph(**packed).logits
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids).logits for ids in (one, other)], 1)
    assert torch.allclose(found, alone, atol=1e-5)


def test_a_user_runs_the_graph_without_this_project(exports: dict[str, Export]) -> None:
    import onnxruntime

    folder = exports["bag"].folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    model = HashedBagForSequenceClassification.from_pretrained(folder.parents[1])
    for texts in (["bottles"], ["the still room", "one teacher", "to all the students"]):
        given = tokenizer(texts, padding=True, return_tensors="np")
        names = [wanted.name for wanted in session.get_inputs()]
        assert names == ["input_ids", "attention_mask"]
        [found] = session.run(["logits"], {name: given[name] for name in names})
        expected = model(**{name: torch.from_numpy(given[name]) for name in names}).logits
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason=NEEDED)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes)).eval()
    with pytest.raises(ModelError, match="export it as transformers or int8"):
        save_onnx(model, {"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.export.graph.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "stillroom\[onnx\]"'):
        GraphStudent(tmp_path, None)
