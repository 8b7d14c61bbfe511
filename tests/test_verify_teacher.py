"""A repaired cache is captured to the same bytes, and a live teacher says what the cache says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_teachers import (
    make_config,
    make_llama,
    make_rows,
    read_files,
    save_teacher,
    write_rows,
)
from typer.testing import CliRunner

from pipeline.cache.verifying.repairing import repair_cache
from pipeline.cache.verifying.whole import verify_cache
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.cli import app
from stages.recomputing import ask_again

HIDDEN = {"layers": [0, -1], "dtype": "int8", "head": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), make_llama())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> CacheConfig:
    """Of a finished cache."""
    root = tmp_path_factory.mktemp("whole")
    data = write_rows(root / "rows.jsonl", make_rows(20))
    made = make_config(root, teacher, data, hidden=HIDDEN)
    cache_teacher(made, progress=False)
    return made


@pytest.fixture
def copy(config: CacheConfig, tmp_path: Path) -> CacheConfig:
    """Of a cache to be damaged."""
    shutil.copytree(config.output, tmp_path / "cache")
    return config.model_copy(update={"output": tmp_path / "cache"})


@pytest.mark.parametrize(
    "name",
    [
        "shards/00001/rows.arrow",
        "shards/00000/hidden.zarr/layer.0/c/0/0",
        "manifest.json",
        "tokenizer/tokenizer.json",
        "head.safetensors",
        "config.yaml",
        "capture.json",
        "teacher.json",
        "index/ids.arrow",
    ],
)
def test_whatever_is_damaged_is_repaired_and_captured_to_the_same_bytes(
    copy: CacheConfig, config: CacheConfig, name: str
) -> None:
    whole = read_files(config.output)
    file = copy.output / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    report = verify_cache(copy.output)
    assert [finding.file for finding in report.harm] == [name]
    assert report.damaged_shards == ([int(name.split("/")[1])] if "shards/" in name else [])
    repair_cache(copy.output, report)
    cache_teacher(copy, progress=False)
    assert verify_cache(copy.output).findings == []
    assert read_files(copy.output) == whole


def test_the_teacher_says_again_what_it_said(config: CacheConfig, teacher: Path) -> None:
    found = ask_again(config.output, str(teacher), 9, seed=0)
    assert (found.examples, found.outside) == (9, [])
    assert found.targets > 50 and found.entries == 8 * found.targets
    assert found.max_log_prob < 1e-3 and found.mean_kl < 1e-6
    assert set(found.cosine) == {"layer.0", "layer.2", "head"}
    assert min(found.cosine.values()) > 0.999


def test_another_teacher_is_told_by_its_divergence_and_the_exit_code(
    config: CacheConfig, teacher: Path, tmp_path: Path
) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.from_numpy(
            np.random.default_rng(0).normal(size=model.lm_head.weight.shape)
        )
    other = save_teacher(tmp_path / "other", model)
    command = ["verify", str(config.output), "--sample", "5", "--json", "--teacher"]
    same = CliRunner().invoke(app, [*command, str(teacher)])
    assert same.exit_code == 0, same.output
    assert json.loads(same.stdout)["teacher"]["outside"] == []
    changed = CliRunner().invoke(app, [*command, str(other)])
    assert changed.exit_code == 5
    told = json.loads(changed.stdout)["teacher"]
    assert told["outside"][0].startswith("mean KL")
    assert told["mean_log_prob"] > 0.01
