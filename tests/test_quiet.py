"""Stages show their own lines and bar, and nothing that the libraries below them would show."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from small_runs import make_data, make_student_config
from small_teachers import make_llama, save_teacher
from transformers import LlamaForCausalLM
from transformers.utils import logging

from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.quiet import quiet_libraries
from stages.train_student import train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher


@pytest.fixture(autouse=True)
def prepare_data_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are prepared already would be read without a bar."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")


def test_the_libraries_show_bars_where_no_stage_silences_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_teacher(tmp_path / "teacher", make_llama())
    LlamaForCausalLM.from_pretrained(folder)
    rows = make_data(tmp_path)
    datasets.load_dataset("json", data_files=rows["files"])
    shown = capsys.readouterr().err
    assert all(bar in shown for bar in ("Writing model", "Loading weights", "Generating train"))


def test_no_stage_shows_a_bar_of_another_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_teacher(tmp_path / "random", make_llama()))
    capsys.readouterr()  # the test's own teacher was written before the first stage began
    asked: dict[str, Any] = {
        "task": {"name": "causal-lm", "block_size": 32},
        "data": make_data(tmp_path),
    }
    recipe = {
        **asked,
        "output": tmp_path / "teacher",
        "model": {"from": "pretrained", "model": folder},
        "training": {"max_steps": 2, "save_steps": 1, "use_cpu": True},
    }
    teacher = train_teacher(TrainTeacherConfig.model_validate(recipe))
    wanted = {**asked, "output": tmp_path / "cache", "teacher": {"model": str(teacher)}}
    cache = cache_teacher(CacheConfig.model_validate(wanted))
    student = make_student_config(cache, tmp_path / "kd", training={"save_steps": 1})
    evaluate(train_student(student))
    assert capsys.readouterr().err == ""


def test_what_was_shown_before_a_stage_is_shown_after_it() -> None:
    before = logging.get_verbosity()
    with quiet_libraries():
        assert datasets.are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == before
    assert not datasets.are_progress_bars_disabled() and logging.is_progress_bar_enabled()
