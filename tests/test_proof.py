"""The arithmetic of the proof's tables, and that every trial's configs are shipped."""

import math

import pytest

from pipeline.config import load_config
from pipeline.metrics import Metric
from pipeline.runs import Result
from stages.cache_teacher import CacheConfig
from stages.cli import find_config
from stages.proof import TRIALS, Trial, distance, tabulate
from stages.train_student import StudentConfig

TRIAL = Trial(("labels", "kd"), (), None, {"loss": False, "accuracy": True})


def make_result(loss: float, slice: str = "all") -> Result:
    metrics = [Metric("loss", loss, "", "lower", slice), Metric("loss", 9.0, "", "lower", "x=y")]
    return Result("x", "student", "causal-lm", {}, {}, {}, {}, metrics)


def test_the_distance_is_in_standard_deviations_of_single_runs() -> None:
    assert math.isclose(distance([5.0, 5.2, 5.4], [4.0, 4.2, 4.4]), 1.0 / 0.2)
    assert distance([4.0, 4.2], [5.0, 5.2]) < 0
    assert distance([4.0, 4.2], [5.0, 5.2], higher=True) > 0


def test_the_table_holds_means_and_deviations() -> None:
    found = {
        "labels": [make_result(5.0), make_result(5.2)],
        "kd": [make_result(4.0), make_result(4.2)],
    }
    lines = tabulate(TRIAL, found)
    assert lines[2] == "| labels | 5.100 ± 0.141 | not measured |  |"
    assert lines[3] == "| kd | 4.100 ± 0.141 | not measured | +7.1 sd |"


def test_what_cannot_be_told_apart_is_said() -> None:
    found = {
        "labels": [make_result(5.0), make_result(5.2)],
        "kd": [make_result(4.9), make_result(5.1)],
    }
    assert tabulate(TRIAL, found)[3].endswith("| +0.7 sd: not told apart |")


def test_slices_are_averaged_in_place_of_the_whole() -> None:
    trial = Trial(("labels",), (), None, {"loss": False}, slices=("a=b", "x=y"))
    assert "| labels | 7.000 |" in tabulate(trial, {"labels": [make_result(5.0, "a=b")]})[2]


@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
def test_the_configs_of_a_trial_belong_together(trial: Trial) -> None:
    caches = {load_config(CacheConfig, find_config("cache", name)).output for name in trial.caches}
    for name in trial.students:
        config = load_config(StudentConfig, find_config("student", name), trial.overrides)
        assert config.cache in caches
    if trial.teacher is not None:
        assert find_config("teacher", trial.teacher).is_file()
