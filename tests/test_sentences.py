"""The files of sentence-transformers: what a folder says of its vectors is what is computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import ModelError
from pipeline.sentences import SentenceHead


def write_modules(folder: Path, *kinds: str, **pooling: Any) -> Path:
    """A folder with a transformer and the named modules, as sentence-transformers lays it out."""
    names = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds, 1))]
    modules = [
        {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, kind) in enumerate(zip(names, ("Transformer", *kinds), strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in names[1:]:
        (folder / name).mkdir(exist_ok=True)
    if "Pooling" in kinds:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def write_dense(folder: Path, activation: str, **settings: Any) -> dict[str, torch.Tensor]:
    weights = {"linear.weight": torch.randn(3, 4), "linear.bias": torch.randn(3)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    config = {"in_features": 4, "out_features": 3, "activation_function": activation, **settings}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    return weights


def test_a_folder_that_says_nothing_means_its_tokens(tmp_path: Path) -> None:
    head = SentenceHead.read(str(tmp_path))
    assert (head.pooling, head.dense, head.normalise) == ("mean", None, False)
    vectors = torch.tensor([[3.0, 4.0]])
    assert torch.equal(head(vectors), vectors)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_read_as_older_and_later_versions_write_it(
    tmp_path: Path, pooling: dict[str, Any], expected: str
) -> None:
    folder = write_modules(tmp_path, "Pooling", "Normalize", **pooling)
    head = SentenceHead.read(str(folder))
    assert (head.pooling, head.normalise) == (expected, True)
    assert head(torch.tensor([[3.0, 4.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_a_dense_layer_acts_as_its_file_says(tmp_path: Path) -> None:
    folder = write_modules(tmp_path, "Pooling", "Dense", pooling_mode_mean_tokens=True)
    weights = write_dense(folder, "torch.nn.modules.activation.Tanh")
    vectors = torch.randn(5, 4)
    expected = torch.tanh(vectors @ weights["linear.weight"].T + weights["linear.bias"])
    torch.testing.assert_close(SentenceHead.read(str(folder))(vectors), expected)


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Pooling", "LSTM"), {"pooling_mode_mean_tokens": True}, "has a module LSTM in"),
        (("Pooling",), {"pooling_mode_max_tokens": True}, "pools by max_tokens; expected the mean"),
        (("Pooling",), {"pooling_mode": "lasttoken"}, "pools by lasttoken; expected the mean"),
        (("Pooling",), {}, "pools by nothing; expected the mean"),
        (("Normalize", "Dense"), {}, "names 2_Dense, which has no config.json"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    tmp_path: Path, kinds: tuple[str, ...], pooling: dict[str, Any], message: str
) -> None:
    folder = write_modules(tmp_path, *kinds, **pooling)
    with pytest.raises(ModelError, match=message):
        SentenceHead.read(str(folder))


def test_a_dense_layer_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write_modules(tmp_path, "Normalize", "Dense")
    for settings in (("torch.nn.modules.activation.GELU", {}), ("Tanh", {"use_residual": True})):
        write_dense(folder, settings[0], **settings[1])
        with pytest.raises(ModelError, match="2_Dense cannot be used"):
            SentenceHead.read(str(folder))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("width", [None, 7])
def test_a_head_is_read_as_it_was_saved(
    tmp_path: Path, pooling: Any, normalise: bool, width: int | None
) -> None:
    dense = None if width is None else nn.Linear(4, width)
    head = SentenceHead(pooling, dense, normalise=normalise)
    head.save(tmp_path, 4)
    found = SentenceHead.read(str(tmp_path))
    vectors = torch.randn(5, 4)
    assert found.pooling == pooling
    assert torch.equal(found(vectors), head(vectors))
