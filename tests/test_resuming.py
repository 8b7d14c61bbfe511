"""A run that was interrupted anywhere continues as if nothing had happened."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_worlds
import torch
import yaml
from safetensors.torch import load_file
from small_runs import count_tokens, make_language_cache, make_student_config, read_lines
from small_teachers import make_tokenizer
from small_worlds import OnStep, make_example, make_student

from pipeline.arguments import EvaluationConfig
from pipeline.batches import Collator, Selection
from pipeline.cache import RowRuns
from pipeline.errors import ConfigError, LockError, StillroomError
from pipeline.freezing import Freezing, Gradual
from pipeline.locking.locks import LOCKS
from pipeline.losses.contrastive import CRD
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.losses.labels import CrossEntropy
from pipeline.resuming import check_run_folder, finish_run
from pipeline.runs import Result, read_result
from pipeline.sampling import Sampling
from pipeline.staging import TrainingStage
from pipeline.training import Outcome, train_model
from stages.train_student import train_student

ROOT = Path(__file__).parents[1]
STOPPED = """
import signal, sys
from pathlib import Path

sys.path.append("tests")
from processes import strike_once
from pipeline.config import load_config
from stages.train_student import StudentConfig, train_student
strike_once(lambda _: Path(sys.argv[2]).exists(), signal.SIGSTOP)
train_student(load_config(StudentConfig, Path(sys.argv[1])))
"""


def read_files(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for the locks, which come and go."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != LOCKS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class _StopError(Exception):
    """Ends a training in the middle."""


def test_a_run_is_one_process_own_until_it_is_killed_and_ends_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_language_cache(tmp_path)
    settings: dict[str, Any] = {
        "student": {
            "from": "scratch",
            "architecture": "gpt2",
            "layers": 1,
            "hidden_size": 16,
            "heads": 2,
            "dropout": 0.2,
        },
        "losses": [{"name": "forward_kl"}, {"name": "hidden_mse", "layers": {1: -1}}],
        "evaluation": {"every": 3},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "logging_steps": 1,
        },
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_student(make_student_config(cache, whole, **settings))
    config = make_student_config(cache, broken, **settings)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(file), str(broken / "checkpoints/checkpoint-9")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    try:
        before = read_files(broken)
        with pytest.raises(LockError, match=rf"broken: process {child.pid} on .* at work there"):
            train_student(config)
        with pytest.raises(StillroomError, match=r"has no result\.json, so the run is not"):
            read_result(broken)
        assert read_files(broken) == before
    finally:
        child.kill()
        child.wait()
    assert not (broken / "result.json").exists()
    capsys.readouterr()
    train_student(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"process {child.pid} on" in said and "has died; its place is taken over" in said
    assert not (broken / LOCKS).exists()
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert_same_curve(whole, broken)
    steps = [(line["step"], line["split"]) for line in read_lines(broken)]
    assert len(set(steps)) == len(steps)
    counted = [read_result(run).training["tokens_seen"] for run in (whole, broken)]
    assert counted == [3 * count_tokens(cache, "train")] * 2


def assert_same_curve(one: Path, other: Path) -> None:
    """The same lines but for the time they took, which never goes back."""
    untimed = [[{**line, "seconds": 0.0} for line in read_lines(run)] for run in (one, other)]
    assert untimed[0] == untimed[1]
    seconds = [line["seconds"] for line in read_lines(other)]
    assert seconds == sorted(seconds)


def learn(
    output: Path,
    stop_after: int | None = None,
    rate: float = 1e-2,
    sampling: Sampling | None = None,
    gradual: Gradual | None = None,
    stages: Sequence[Mapping[str, Any]] = ({},),
    **evaluation: Any,
) -> Outcome:
    """Nine steps in three epochs of ten examples, two micro-batches a step, a save each step."""

    taken = 0

    def stop(_: int) -> None:
        nonlocal taken
        taken += 1
        if taken == stop_after:
            raise _StopError

    examples = Selection([make_example(number) for number in range(10)])
    if sampling is not None:
        halves = {"many": RowRuns(np.array([0]), np.array([8]))}
        halves["few"] = RowRuns(np.array([8]), np.array([2]))
        examples.deal = sampling.deal(halves)
    stage = TrainingStage(
        losses=[ForwardKL(), HiddenMSE(layers={1: -1}), CRD(width=4, memory=6)],
        train=examples,
        collator=Collator(small_worlds.TASK, 0, small_worlds.SIGNALS),
        training={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "use_cpu": True,
            "logging_steps": 1,
            "save_steps": 1,
            "learning_rate": rate,
        },
        teacher_widths=small_worlds.WIDTHS,
        freezing=Freezing(gradual=gradual),
        callbacks=[OnStep(stop)],
    )
    return train_model(
        make_student(attention_dropout=0.3),
        small_worlds.TASK,
        [replace(stage, **changes) for changes in stages],
        {"test": examples},
        make_tokenizer(),
        EvaluationConfig(every=1, **evaluation),
        output,
    )


# In epoch 0, in and at the end of others.
@pytest.mark.parametrize(
    ("stop_after", "settings"),
    [
        (1, {}),
        (4, {}),
        (7, {}),
        (4, {"sampling": Sampling(by="language", exponent=0.3)}),
        (4, {"gradual": Gradual(until=0.9)}),
        (7, {"gradual": Gradual(until=0.9)}),
    ],
)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    tmp_path: Path, stop_after: int, settings: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = learn(whole, **settings)
    with pytest.raises(_StopError):
        learn(broken, stop_after, **settings)
    found = learn(broken, **settings)
    one, other = (load_file(run / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same_curve(whole, broken)
    assert (found.taken.tokens, found.taken.steps, found.taken.epochs) == (
        expected.taken.tokens,
        9,
        3.0,
    )


def test_patience_survives_an_interruption(tmp_path: Path) -> None:
    stopping: Any = {"rate": 0.5, "early_stopping": {"metric": "loss", "patience": 3}}
    expected = learn(tmp_path / "whole", **stopping)
    with pytest.raises(_StopError):
        learn(tmp_path / "broken", expected.taken.steps - 1, **stopping)
    found = learn(tmp_path / "broken", **stopping)
    assert 3 < found.taken.steps == expected.taken.steps < 9
    assert_same_curve(tmp_path / "whole", tmp_path / "broken")


def test_a_session_that_takes_no_step_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    stopping: Any = {"rate": 0.5, "early_stopping": {"metric": "loss", "patience": 3}}
    last = learn(tmp_path, **stopping).taken.steps
    saved = list((tmp_path / f"checkpoints/checkpoint-{last}").iterdir())
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in saved}
    learn(tmp_path, **stopping)  # as after a kill between the training and its result
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in saved}


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    learn(whole)
    with pytest.raises(_StopError):
        learn(broken, 5)
    for name, state in {"checkpoint-6": None, "checkpoint-7": '{"global_st'}.items():
        folder = broken / "checkpoints" / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    with (broken / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "epo')
    learn(broken)
    assert_same_curve(whole, broken)


STAGES: list[dict[str, Any]] = [
    {"name": "hidden", "losses": [HiddenMSE(layers={1: -1})], "freezing": Freezing(top=1)},
    {"name": "logits", "freezing": Freezing(gradual=Gradual(until=0.9))},
    {"name": "labels", "losses": [CrossEntropy()]},
]


@pytest.mark.parametrize("stop_after", [9, 11, 18, 20])  # at the ends of stages and within
def test_a_run_stopped_in_any_stage_ends_with_the_same_bits(
    tmp_path: Path, stop_after: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = learn(whole, stages=STAGES)
    with pytest.raises(_StopError):
        learn(broken, stop_after, stages=STAGES)
    found = learn(broken, stages=STAGES)
    one, other = (load_file(run / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same_curve(whole, broken)
    assert replace(found.taken, seconds=0.0) == replace(expected.taken, seconds=0.0)
    assert (found.taken.steps, found.taken.epochs, found.taken.examples) == (27, 9.0, 90)


def test_a_config_from_before_a_setting_existed_is_the_same_config(tmp_path: Path) -> None:
    config = make_student_config(tmp_path / "cache", tmp_path / "run")
    assert not check_run_folder(config.output, config)
    (config.output / "result.json").touch()
    file = config.output / "config.yaml"
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    del raw["learning_rates"], raw["evaluation"]
    file.write_text(yaml.safe_dump({**raw, "freeze": []}), encoding="utf-8")
    assert check_run_folder(config.output, config)
    file.write_text(yaml.safe_dump({**raw, "freeze": ["*embed*"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a run of another config"):
        check_run_folder(config.output, config)


def test_a_run_whose_folder_vanished_is_never_whole(tmp_path: Path) -> None:
    config = make_student_config(tmp_path / "cache", tmp_path / "run")
    check_run_folder(config.output, config)
    shutil.rmtree(config.output)
    config.output.mkdir()  # as saving the weights does
    result = Result("run", "student", "causal-lm", {}, {}, {}, {}, [])
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        finish_run(config.output, result)
    assert not (config.output / "result.json").exists()


def test_what_was_saved_after_a_folder_had_vanished_is_not_gone_on_from(tmp_path: Path) -> None:
    config = make_student_config(tmp_path / "cache", tmp_path / "run")
    state = config.output / "checkpoints/checkpoint-2/trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}", encoding="utf-8")
    (config.output / "metrics.jsonl").write_text('{"step": 2}\n', encoding="utf-8")
    assert not check_run_folder(config.output, config)
    assert sorted(file.name for file in config.output.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("name", ["manifest.json", "draft.json", "view.json"])
def test_a_run_does_not_begin_where_a_cache_stands(tmp_path: Path, name: str) -> None:
    config = make_student_config(tmp_path / "cache", tmp_path / "run")
    config.output.mkdir()
    (config.output / name).touch()
    with pytest.raises(ConfigError, match=rf"run: holds a cache \({name}\); choose another"):
        check_run_folder(config.output, config)
    assert [file.name for file in config.output.iterdir()] == [name]
