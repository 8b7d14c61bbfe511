"""`compare` on run folders: which runs it finds, what it refuses, what it notes."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_caches import class_example, write_cache

from pipeline.cache import read_manifest
from pipeline.errors import StillroomError
from pipeline.metrics import Metric
from pipeline.runs import Result, write_json, write_result
from stages.compare import compare, read_comparison

LABELS = [{"name": "cross_entropy", "weight": 1.0}]
DISTILLED = [{"name": "forward_kl", "weight": 1.0, "temperature": 1.0}]


def write_run(path: Path, **changes: Any) -> Path:
    teacher = {"name": "big", "parameters": 9, "metrics": [asdict(loss_of(2.0))]}
    config = {"cache": str(changes.pop("cache", "gone")), "losses": changes.pop("losses", LABELS)}
    fields: dict[str, Any] = {
        "name": path.name,
        "kind": "student",
        "task": "causal-lm",
        "config": config,
        "identity": {"cache": changes.pop("digest", "a-digest")},
        "model": {"parameters": changes.pop("parameters", 5)},
        "training": {"tokens_seen": 4000, "seconds": 1.0},
        "metrics": [loss_of(changes.pop("loss", 3.0))],
        "details": {"teacher": changes.pop("teacher", teacher)},
    }
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{}\n", encoding="utf-8")
    write_result(path, Result(**{**fields, **changes}))
    return path


def loss_of(value: float) -> Metric:
    return Metric("loss", value, "nats/token", "lower")


def write_timed_cache(path: Path, timed: bool = True) -> str:
    """A cache of three tokens, two of which were timed; returns its digest."""
    example = class_example("s-0", torch.tensor([[1.0, 3.0, 0.0]]), 0)
    write_cache(path, [example], shifted=False)
    if timed:
        timing = {"seconds": 8.0, "forward_seconds": 4.0, "tokens": 2, "targets": 1}
        write_json(path / "capture.json", timing)
    return read_manifest(path).digest


def test_runs_keep_their_order_and_the_page_is_written(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("b", "a")]
    console = Console(width=120)
    with console.capture() as capture:
        page = compare(runs, tmp_path / "out" / "report.html", console)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    printed = capture.get()
    assert printed.index("teacher big ") < printed.index("\nb ") < printed.index("\na ")


def test_a_folder_of_runs_stands_for_its_finished_runs_undistilled_and_small_first(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "demo" / "a-large", losses=DISTILLED, parameters=9)
    write_run(tmp_path / "demo" / "a-deep" / "b-small", losses=DISTILLED)
    write_run(tmp_path / "demo" / "c-labels")
    (tmp_path / "demo" / "begun").mkdir()
    (tmp_path / "demo" / "begun" / "config.yaml").write_text("{}\n", encoding="utf-8")
    comparison = read_comparison([tmp_path / "demo"])
    assert [run.label for run in comparison.runs] == ["c-labels", "b-small", "a-large"]
    assert any("begun: not finished" in note for note in comparison.notes)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / seed / "kd") for seed in ("seed-0", "seed-1")]
    assert [r.label for r in read_comparison(runs).runs] == ["seed-0/kd", "seed-1/kd"]


def test_a_run_named_twice_is_compared_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "kd")
    assert len(read_comparison([run, run, tmp_path]).runs) == 1


def test_a_teacher_of_several_runs_is_one_row(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    [teacher] = read_comparison(runs).teachers
    assert (teacher.name, teacher.parameters, teacher.metrics) == ("big", 9, [loss_of(2.0)])


def test_runs_with_slices_of_their_own_share_their_teacher(tmp_path: Path) -> None:
    def teacher(*slices: str) -> dict[str, Any]:
        metrics = [loss_of(2.0), *(replace(loss_of(2.5), slice=slice) for slice in slices)]
        return {"name": "big", "parameters": 9, "metrics": [asdict(m) for m in metrics]}

    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", teacher=teacher("language=en", "topic=x")),
        write_run(tmp_path / "c", teacher=teacher("language=en")),
    ]
    [found] = read_comparison(runs).teachers
    assert [m.slice for m in found.metrics] == ["all", "language=en", "topic=x"]


def test_a_teacher_measured_differently_is_told_apart_by_the_run(tmp_path: Path) -> None:
    other = {"name": "big", "parameters": 9, "metrics": [asdict(loss_of(2.5))]}
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", teacher=other),
        write_run(tmp_path / "c", teacher=other),
    ]
    names = [teacher.name for teacher in read_comparison(runs).teachers]
    assert names == ["big", "big (for b)"]


def test_the_cost_of_a_cache_that_is_still_there_is_read(tmp_path: Path) -> None:
    digest = write_timed_cache(tmp_path / "cache")
    run = write_run(tmp_path / "runs" / "kd", cache=tmp_path / "cache", digest=digest)
    comparison = read_comparison([run])
    [cache] = comparison.caches
    assert (cache.path, cache.digest) == (str(tmp_path / "cache"), digest)
    assert (cache.examples, cache.tokens, cache.targets) == (1, 3, 1)
    assert sum(cache.column_bytes.values()) >= cache.bytes > 0
    assert comparison.notes == []


def test_tokens_that_were_captured_but_not_timed_are_priced_like_the_others(tmp_path: Path) -> None:
    digest = write_timed_cache(tmp_path / "cache")
    run = write_run(tmp_path / "runs" / "kd", cache=tmp_path / "cache", digest=digest)
    [cache] = read_comparison([run]).caches
    assert (cache.capture_seconds, cache.forward_seconds) == (12.0, 6.0)


@pytest.mark.parametrize(
    ("there", "timed", "note"),
    [
        (False, False, "is no longer there"),
        (True, False, "capture.json is missing"),
        (True, True, "holds another cache now"),
    ],
)
def test_a_cost_that_cannot_be_told_is_left_out_with_a_note(
    tmp_path: Path, there: bool, timed: bool, note: str
) -> None:
    digest = write_timed_cache(tmp_path / "cache", timed) if there else "gone"
    digest = "another" if timed else digest
    comparison = read_comparison(
        [write_run(tmp_path / "kd", cache=tmp_path / "cache", digest=digest)]
    )
    assert comparison.caches == []
    [found] = comparison.notes
    assert note in found and "of kd is left out" in found


def test_a_cache_that_cannot_be_read_is_left_out_with_the_reason(tmp_path: Path) -> None:
    digest = write_timed_cache(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").write_text("{", encoding="utf-8")
    run = write_run(tmp_path / "kd", cache=tmp_path / "cache", digest=digest)
    [note] = read_comparison([run]).notes
    assert "manifest.json: cannot be read" in note and "no longer there" not in note


def test_runs_of_different_caches_may_be_compared_and_the_report_says_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, cache=name, digest=name) for name in ("a", "b")]
    assert "different caches" in read_comparison(runs).notes[0]


def test_runs_of_different_tasks_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", task="sequence-classification")]
    with pytest.raises(StillroomError, match="compare runs of one task") as caught:
        read_comparison(runs)
    assert "\n" not in str(caught.value)


def test_a_missing_run_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_run(tmp_path / "distilled")
    with pytest.raises(StillroomError, match=r"no such run; did you mean 'distilled'\?"):
        read_comparison([tmp_path / "distiled"])


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kd").mkdir()
    (tmp_path / "kd" / "config.yaml").write_text("{}\n", encoding="utf-8")
    with pytest.raises(StillroomError, match="not finished"):
        read_comparison([tmp_path / "kd"])


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match="holds no finished run"):
        read_comparison([tmp_path])
