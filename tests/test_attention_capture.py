"""Attention vectors from a teacher into a cache, and from there into students."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_runs import TINY, make_data, make_student_config, make_topic_cache, read_lines
from small_teachers import make_config, make_llama, make_rows, save_teacher, write_rows
from small_translators import MAKERS, make_translation_cache
from transformers import AutoModelForSequenceClassification

from pipeline.attention import PARTS, watch_attention
from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, ModelError
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.hidden import HiddenConfig
from stages.train_student import train_student

BERT = {"from": "scratch", "architecture": "bert", **TINY}


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hidden = {"layers": [-1], "qkv": [-1], "dtype": "float32", "projection": None}
    return make_topic_cache(tmp_path_factory.mktemp("topics"), hidden=hidden)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a teacher whose queries share keys and values by twos, captured by two workers."""
    root = tmp_path_factory.mktemp("language")
    teacher = save_teacher(root / "teacher", make_llama(num_key_value_heads=2))
    hidden = {"qkv": [1, -1], "dtype": "float16", "projection": {"name": "random", "width": 8}}
    changes: dict[str, Any] = {
        "data": make_data(root),
        "hidden": {**hidden, "layers": [-1]},
        "batch": {"tokens": 128, "workers": 2},
    }
    config = make_config(root, teacher, root)
    whole = CacheConfig.model_validate(config.model_dump(exclude=set(changes)) | changes)
    return cache_teacher(whole, progress=False)


def train(cache: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"num_train_epochs": 12, "learning_rate": 1e-2, "logging_steps": 1}
    train_student(make_student_config(cache, output, training=settings, **changes))
    return [line for line in read_lines(output) if line["split"] == "train"]


def test_the_cache_holds_what_the_projections_gave(topics: Path) -> None:
    cache = TeacherCache.open(topics)
    signals = [f"{part}.2" for part in PARTS]
    assert {name: cache.manifest.signals[name].heads for name in signals} == dict.fromkeys(
        signals, 4
    )
    assert cache.manifest.signals["layer.2"].heads is None
    model = AutoModelForSequenceClassification.from_pretrained(topics.parent / "teacher").eval()
    for row in (0, 7, 29):
        example = cache[row]
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad(), watch_attention(model, signals) as seen:
            model(input_ids=ids)
        for name in signals:
            expected = seen[name][0].flatten(1)
            torch.testing.assert_close(example.hidden[name], expected, rtol=1e-4, atol=1e-5)


def test_keys_that_are_shared_are_kept_once_and_nothing_is_projected(language: Path) -> None:
    signals = TeacherCache.open(language).manifest.signals
    assert {name: (signal.width, signal.heads) for name, signal in signals.items()} == {
        "layer.2": (8, None),
        **{f"query.{layer}": (32, 4) for layer in (1, 2)},
        **{f"{part}.{layer}": (16, 2) for part in ("key", "value") for layer in (1, 2)},
    }
    assert {name for name, signal in signals.items() if signal.projection} == {"layer.2"}


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "minilm", "relation_heads": 8},
        {"name": "attention_mse", "layers": {1: -1}},
        {"name": "attention_kl"},
    ],
    ids=lambda loss: str(loss["name"]),
)
def test_a_student_learns_the_attention_of_its_teacher(
    topics: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    student = {**BERT, "heads": 4}
    lines = train(topics, tmp_path / "run", student=student, losses=[loss])
    terms = [line[f"term/{loss['name']}"] for line in lines]
    assert np.mean(terms[-3:]) < 0.8 * np.mean(terms[:3])


def test_a_student_with_other_heads_learns_relations_beside_logits(
    language: Path, tmp_path: Path
) -> None:
    losses = [{"name": "forward_kl"}, {"name": "minilm", "relation_heads": 2, "layers": "uniform"}]
    lines = train(language, tmp_path / "run", losses=losses)
    terms = [line["term/minilm"] for line in lines]
    assert np.mean(terms[-3:]) < 0.8 * np.mean(terms[:3])


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_a_student_with_the_teachers_weights_has_nothing_to_learn(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of a translator it is the decoder's own attention, at the targets."""
    if name in MAKERS:
        hidden = {"qkv": [-1], "dtype": "float32"}
        cache = make_translation_cache(tmp_path, MAKERS[name](), hidden=hidden)
    else:
        cache = request.getfixturevalue({"bert": "topics", "llama": "language"}[name])
    teacher = {"from": "pretrained", "model": str(cache.parent / "teacher"), "dropout": 0.0}
    losses = [{"name": "minilm", "relation_heads": 2}, {"name": "attention_kl"}]
    settings = {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
    config = make_student_config(
        cache, tmp_path / "run", student=teacher, losses=losses, training=settings
    )
    line = read_lines(train_student(config))[0]
    limit = 1e-4 if name == "llama" else 1e-6  # kept in float16, or float32
    assert abs(line["term/minilm"]) < limit
    assert abs(line["term/attention_kl"]) < limit


def test_attention_that_is_not_cached_is_refused(topics: Path, tmp_path: Path) -> None:
    def refused(match: str, **loss: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            train(topics, tmp_path / "run", student=BERT, losses=[loss])

    refused(r"no hidden states 'key.1', 'query.1' \(it has", name="attention_kl", layers={1: 1})
    refused("teacher has no layer 3", name="minilm", layers={1: 3})
    refused(r"layer 2: the model has layers 1 to 1", name="minilm", layers={2: -1})
    refused("5 do not divide the 16 numbers of the student's", name="minilm", relation_heads=5)
    refused("the student has 2 attention heads, the teacher 4", name="attention_mse")


def test_a_layer_that_is_dropped_in_training_is_refused(topics: Path, tmp_path: Path) -> None:
    dropped = {"layerdrop": 1.0, "ffn_dim": 24, "word_embed_proj_dim": 16}
    student = {"from": "scratch", "architecture": "opt", **TINY, "settings": dropped}
    loss = {"name": "minilm", "relation_heads": 2}
    with pytest.raises(ModelError, match=r"not seen at work \(key.-1\); set the layerdrop"):
        train(topics, tmp_path / "run", student=student, losses=[loss])


def test_attention_needs_all_positions() -> None:
    with pytest.raises(ValidationError, match=r"between all tokens .* leave hidden.positions at"):
        HiddenConfig.model_validate({"qkv": [-1], "positions": "labelled"})


def test_a_layer_that_the_teacher_does_not_have_is_refused(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_llama())
    data = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    config = make_config(tmp_path, teacher, data, hidden={"qkv": [0]})
    with pytest.raises(ConfigError, match="attention of layer 0: the model has layers 1 to 2"):
        cache_teacher(config, progress=False)
