"""One process at a time trains in a run's folder; whoever comes second is told who does."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from small_runs import make_student_config

from pipeline.beginning import begin_run
from pipeline.errors import ConfigError, LockError
from pipeline.locking.exclusive import create_exclusively
from pipeline.locking.locks import LOCKS, occupy
from pipeline.locking.owners import Owner
from pipeline.resuming import finish_run
from pipeline.runs import Result

FINISHED = Result("run", "student", "causal-lm", {}, {}, {}, {}, [])


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return make_student_config(tmp_path / "cache", tmp_path / "run")


def begin(config: Any, **changes: Any) -> Any:
    def plan() -> transformers.TrainingArguments:
        return transformers.TrainingArguments(str(config.output / "checkpoints"), use_cpu=True)

    return begin_run(config.output, config, "train-student", plan, **changes)


def test_a_second_training_is_refused_in_one_line_and_changes_nothing(config: Any) -> None:
    with begin(config):
        other = config.model_copy(update={"seed": 7})
        with pytest.raises(LockError) as refusal, begin(other):
            pass
        assert {file.name for file in config.output.iterdir()} == {"config.yaml", LOCKS}
        assert "seed: 0" in (config.output / "config.yaml").read_text(encoding="utf-8")
    assert not (config.output / LOCKS).exists()
    told = str(refusal.value)
    assert f"run: process {os.getpid()} on {Owner('', '', True).host} (stillroom" in told
    assert told.endswith("; wait until it has ended, or choose another output")
    wait = r"cache-teacher.* wait until it has ended$"
    with (
        occupy(config.output, "cache-teacher"),
        pytest.raises(LockError, match=wait),
        begin(config),
    ):
        pass


def test_a_training_that_failed_leaves_its_folder_to_the_next_one(config: Any) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), begin(config) as place:
            assert place is not None
            raise KeyboardInterrupt
        assert sorted(file.name for file in config.output.iterdir()) == ["config.yaml"]


def test_the_place_of_a_dead_process_is_taken_and_told_of(config: Any) -> None:
    owner = Owner("feedfacefeedface", "train-student", False, admitted=True, started="1")
    create_exclusively(config.output / LOCKS / f"{owner.token}.json", owner.dump())
    told: list[str] = []
    with begin(config, tell=told.append) as place:
        assert place is not None
    (line,) = told
    assert f"process {owner.process} on {owner.host}" in line and "has died" in line
    assert not (config.output / LOCKS).exists()


def test_a_training_that_was_taken_for_dead_ends_before_it_writes(config: Any) -> None:
    with begin(config) as place:
        place.on_step_end(None, None, None)
        for file in (config.output / LOCKS).iterdir():
            file.unlink()
        with pytest.raises(LockError, match=r"run: was taken over .* run the same command again"):
            place.on_step_end(None, None, None)


def test_a_finished_run_is_left_as_it_is_whoever_is_there(config: Any) -> None:
    with begin(config):
        finish_run(config.output, FINISHED)
    assert not (config.output / LOCKS).exists()
    with occupy(config.output, "train-student"), begin(config) as place:
        assert place is None
    owner = Owner("feedfacefeedface", "train-student", False, admitted=True, started="1")
    create_exclusively(config.output / LOCKS / f"{owner.token}.json", owner.dump())
    with begin(config) as place:  # as after a kill between the result and the end
        assert place is None
    assert not (config.output / LOCKS).exists()
    assert (config.output / "result.json").is_file()


def test_a_run_that_another_process_has_just_finished_is_kept(config: Any) -> None:
    with begin(config):
        pass

    def finish_meanwhile() -> Any:
        finish_run(config.output, FINISHED)
        return SimpleNamespace(world_size=1, process_index=0)

    with begin_run(config.output, config, "train-student", finish_meanwhile) as place:
        assert place is None


def test_a_folder_of_another_run_is_refused_and_holds_no_lock(config: Any) -> None:
    with begin(config):
        finish_run(config.output, FINISHED)
    other = config.model_copy(update={"seed": 7})
    before = sorted(config.output.rglob("*"))
    with (
        pytest.raises(ConfigError, match=r"another config \(seed: 0 there, 7 here\)"),
        begin(other),
    ):
        pass
    assert sorted(config.output.rglob("*")) == before
