"""Many runs of one config: named by their settings, side by side, kept, ordered and compared."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from small_runs import make_language_cache, make_student_config

from pipeline.errors import ConfigError, StillroomError
from pipeline.runs import read_curve, read_result
from stages.search import Grid, Range, make_proposer, parse_grid, parse_ranges
from stages.sweep import Sweep, name_run, order_runs, sweep


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plan(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two steps of a student with two losses."""
    folder = tmp_path_factory.mktemp("sweep")
    config = make_student_config(
        cache,
        folder / "runs",
        losses=[{"name": "forward_kl"}, {"name": "cross_entropy"}],
        training={"max_steps": 2},
    )
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return Sweep(file, console=Console(file=io.StringIO(), width=200))


def said(plan: Sweep) -> str:
    """What was told so far."""
    assert isinstance(plan.console.file, io.StringIO)
    return plan.console.file.getvalue()


def test_a_grid_is_trained_compared_and_kept_and_a_failure_stops_no_other(plan: Sweep) -> None:
    grid = {"losses.0.weight": [0.5, 1.0], "training.optim": ["sgd", "adamw_torch_npu_fused"]}
    runs = plan.student().output
    with pytest.raises(StillroomError, match=r"2 of 4 runs failed: .*fused \(.*torch_npu.*run it"):
        sweep(plan, Grid(grid))
    finished = sorted(path.parent.name for path in runs.glob("weight=*/result.json"))
    assert finished == ["weight=0.5,optim=sgd", "weight=1.0,optim=sgd"]
    for name in finished:
        config = read_result(runs / name).config
        assert f"weight={config['losses'][0]['weight']}" in name
        assert config["training"] == {**plan.student().training, "optim": "sgd"}
        assert config["losses"][1] == plan.student().model_dump(mode="json")["losses"][1]
    report = (runs / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in finished)
    before = {name: (runs / name / "result.json").stat().st_mtime_ns for name in finished}
    again = sweep(plan, Grid({**grid, "training.optim": ["sgd"]}))
    assert again == runs / "report.html"
    assert before == {name: (runs / name / "result.json").stat().st_mtime_ns for name in finished}
    assert "weight=0.5,optim=sgd: loss " in said(plan)


def test_runs_at_a_time_share_the_processors_and_say_what_they_say_in_a_log(plan: Sweep) -> None:
    two = replace(plan, jobs=2)
    with pytest.raises(StillroomError, match=r"1 of 2 runs failed: split=tset \(.*'tset'; did you"):
        sweep(two, Grid({"evaluation.split": ["test", "tset"]}))
    run = plan.student().output / "split=test"
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert read_result(run).training["threads"] == threads
    assert "s of training" in (run / "train.log").read_text(encoding="utf-8")


def test_what_does_not_fit_is_refused_before_any_run(plan: Sweep) -> None:
    with pytest.raises(ConfigError, match="did you mean 'losses'"):
        sweep(plan, Grid({"losse.0.weight": [1.0]}))
    with pytest.raises(ConfigError, match="should be a valid number"):
        sweep(plan, Grid({"losses.0.weight": ["much"]}))
    other = Sweep(plan.config, metric="los", console=plan.console)
    sweep(plan, Grid({"seed": [5]}))
    with pytest.raises(ConfigError, match=r"no metric 'los'; did you mean 'loss'"):
        sweep(other, Grid({"seed": [5]}))


def test_runs_are_ordered_by_the_metric_and_its_own_direction(plan: Sweep) -> None:
    sweep(plan, Grid({"training.learning_rate": [0.0, 0.05]}))
    runs = [plan.student().output / f"learning_rate={rate}" for rate in ("0.0", "0.05")]
    losses = [read_result(run).metric("loss") for run in runs]
    assert losses[0] > losses[1]
    assert order_runs(runs, "loss") == runs[::-1]
    agreement = [read_result(run).metric("agreement") for run in runs]
    best = runs if agreement[0] > agreement[1] else runs[::-1]
    assert order_runs(runs, "agreement") == best
    assert len(read_curve(runs[0])) == 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"training.learning_rate": 1e-3, "seed": 2}, "learning_rate=0.001,seed=2"),
        ({"losses.0.weight": 0.5, "losses.1.weight": 1}, "0.weight=0.5,1.weight=1"),
        ({"training.bf16": True, "freeze": []}, "bf16=true,freeze=_-"),
        ({"student.model": "a/b"}, "model=a_b-"),
        ({"student.model": "a" * 300}, "model=" + "a" * 114 + "-"),
    ],
)
def test_a_folder_is_named_by_its_settings(settings: dict[str, Any], name: str) -> None:
    assert name_run(settings).startswith(name)
    assert len(name_run(settings)) - len(name) == (8 if name.endswith("-") else 0)


def test_names_that_would_be_alike_differ() -> None:
    assert name_run({"student.model": "a/b"}) != name_run({"student.model": "a b"})


def test_grids_and_ranges_are_read_from_the_command_line() -> None:
    grid = parse_grid(["a.b=1e-3,x,true", "c=[[1, 2], [3]]"])
    assert grid == {"a.b": [1e-3, "x", True], "c": [[1, 2], [3]]}
    found = parse_ranges(["lr=1e-4:1e-2:log", "layers=1:4", "tail=bucket,draws"])
    assert found == {
        "lr": Range(1e-4, 1e-2, log=True),
        "layers": Range(1, 4),
        "tail": Range(choices=("bucket", "draws")),
    }


@pytest.mark.parametrize(
    ("grid", "search", "message"),
    [
        (["d=[1"], [], "no value that YAML can read"),
        (["seed"], [], "--grid seed: expected key=value,value"),
        (["seed=1", "seed=2"], [], "seed is varied twice"),
        ([], ["lr=1:0"], "--search lr=1:0: expected two rising numbers"),
        ([], ["lr=0:1:log"], "needs a low above 0"),
        ([], ["lr=0:1:lin"], "expected two rising numbers"),
        ([], [], "give --grid .* or --search"),
        (["seed=1"], ["lr=0:1"], "one of the two"),
    ],
)
def test_what_cannot_be_read_is_refused(grid: list[str], search: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_proposer(grid, search, 1, 0, False)


def test_a_search_goes_on_from_what_it_found(plan: Sweep) -> None:
    pytest.importorskip("optuna", reason='needs pip install "stillroom[sweep]"')
    alone = Sweep(plan.config, ["training.max_steps=1"], console=plan.console)
    options = ["training.learning_rate=1e-3:1e-1:log", "losses.0.tail=bucket,draws"]
    runs = alone.student().output

    def search(trials: int) -> set[str]:
        sweep(alone, make_proposer([], options, trials, 0, False))
        return {path.parent.name for path in runs.glob("*tail=*/result.json")}

    two = search(2)
    assert len(two) == 2
    times = {name: (runs / name / "result.json").stat().st_mtime_ns for name in two}
    three = search(3)
    assert two < three and len(three) == 3
    assert times == {name: (runs / name / "result.json").stat().st_mtime_ns for name in two}
    for name in three:
        rate = read_result(runs / name).config["training"]["learning_rate"]
        assert 1e-3 <= rate <= 1e-1 and name.startswith(f"learning_rate={rate}")


def test_a_search_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "stillroom\[sweep\]"'):
        make_proposer([], ["seed=0:3"], 1, 0, False)
