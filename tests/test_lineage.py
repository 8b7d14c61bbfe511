"""A student goes on, and is measured, with what it has learned from, or not at all."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import TINY, make_data, make_student_config, make_topic_cache
from small_teachers import make_rows, write_rows

from pipeline.errors import CacheError, ConfigError, MismatchError
from pipeline.runs import read_result
from pipeline.sources import DataConfig
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.export import export
from stages.train_student import StudentConfig, train_student
from stages.train_tasks import TasksConfig, train_tasks

BAG = {
    "from": "scratch",
    "architecture": "hashed-bag",
    "hidden_size": 8,
    "tokenizer": {"buckets": 64},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache, and others that differ from it in one thing."""
    root = tmp_path_factory.mktemp("caches")
    made = {"first": make_topic_cache(root)}
    settings = {
        "teacher": {"model": str(root / "teacher")},
        "task": {"name": "sequence-classification", "max_length": 48},
        "data": {**make_data(root), "carry": ["text", "language"]},
        "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
        "hidden": {"layers": [-1], "pooled": True, "dtype": "float32"},
        "batch": {"tokens": 256},
        "shard": {"examples": 16},
    }
    rows = make_rows(30)
    rows[3]["text"] = "once again"
    word = {**settings["data"], "files": {**settings["data"]["files"]}}
    word["files"]["train"] = str(write_rows(root / "changed.jsonl", rows[:22]))
    changes: dict[str, dict[str, Any]] = {
        "targets": {"targets": {**settings["targets"], "temperatures": [1.0, 3.0]}},
        "data": {"data": word},
        "same": {},
    }
    for name, change in changes.items():
        output = {"output": str(root / name)}
        config = CacheConfig.model_validate({**settings, **output, **change})
        made[name] = cache_teacher(config, progress=False)
    return made


def put(cache: Path, place: Path) -> Path:
    """A cache at a path where another one may stand."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(cache, place)
    return place


def make_config(caches: dict[str, Path], tmp_path: Path, **changes: Any) -> StudentConfig:
    place = put(caches["first"], tmp_path / "cache")
    bert = {"from": "scratch", "architecture": "bert", **TINY}
    settings: dict[str, Any] = {"student": bert, "training": {"max_steps": 1}, **changes}
    return make_student_config(place, tmp_path / "run", **settings)


def interrupt(run: Path) -> None:
    """What a run is before its result: a checkpoint to go on from."""
    (run / "result.json").unlink()
    state = run / "checkpoints" / "checkpoint-1" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}", encoding="utf-8")


def test_a_run_names_what_differs_in_the_cache_that_it_is_given(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(caches, tmp_path)
    run = train_student(config)
    known = read_result(run).identity
    put(caches["same"], config.cache)
    assert train_student(config) == run  # made anew, the same bytes
    for name, field in (("targets", r"cache\.targets"), ("data", r"cache\.data .*…, found ")):
        put(caches[name], config.cache)
        refusal = rf"run: learned from {field}.*; give it what it was trained on"
        with pytest.raises(MismatchError, match=refusal):
            train_student(config)
        with pytest.raises(MismatchError, match=refusal):
            evaluate(run)
        with pytest.raises(MismatchError, match=refusal):
            export(run, "transformers", tmp_path / "export")
    interrupt(run)
    with pytest.raises(MismatchError, match=r"learned from cache\.data"):
        train_student(config)
    assert known["cache.data"] != known["cache.tokenizer"]


def test_a_run_that_has_taken_no_step_may_begin_with_another_cache(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(caches, tmp_path)
    train_student(config)
    (config.output / "result.json").unlink()
    put(caches["data"], config.cache)
    train_student(config)
    put(caches["first"], config.cache)
    with pytest.raises(MismatchError, match=r"learned from cache\.data"):
        train_student(config)


def test_texts_of_its_own_and_further_teachers_are_part_of_what_a_run_learned_from(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    texts = {**make_data(tmp_path), "carry": ["language"]}
    further = put(caches["same"], tmp_path / "further")
    config = make_config(
        caches,
        tmp_path,
        student=BAG,
        inputs=DataConfig.model_validate(texts),
        further_teachers={"caches": {"other": {"cache": str(further)}}},
    )
    train_student(config)
    put(caches["data"], further)
    with pytest.raises(MismatchError, match=r"learned from further_teachers\.other"):
        train_student(config)
    put(caches["same"], further)
    rows = make_rows(30)
    rows[0]["text"] = "another text"
    write_rows(tmp_path / "train.jsonl", rows[:22])
    with pytest.raises(MismatchError, match="learned from inputs"):
        train_student(config)


def make_tasks(root: Path, **caches: Path) -> TasksConfig:
    """A student of two tasks, the second with another teacher beside it."""
    losses = [{"name": "forward_kl"}]
    tasks: dict[str, Any] = {
        name: {"cache": str(caches[name]), "losses": losses} for name in ("one", "other")
    }
    if "further" in caches:
        tasks["other"]["further_teachers"] = {"caches": {"more": {"cache": str(caches["further"])}}}
    return TasksConfig.model_validate(
        {
            "output": str(root / "run"),
            "student": {"from": "scratch", "architecture": "bert", **TINY},
            "tasks": tasks,
            "training": {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 4},
        }
    )


def test_each_task_of_a_student_keeps_to_its_cache(caches: dict[str, Path], tmp_path: Path) -> None:
    one, other = (put(caches["first"], tmp_path / name) for name in ("one", "other"))
    config = make_tasks(tmp_path, one=one, other=other)
    train_tasks(config)
    put(caches["targets"], other)
    with pytest.raises(MismatchError, match=r"run: learned from other\.cache\.targets"):
        train_tasks(config)
    (config.output / "one" / "result.json").unlink()
    interrupt(config.output / "other")
    shutil.copytree(config.output / "other" / "checkpoints", config.output / "checkpoints")
    with pytest.raises(MismatchError, match=r"run: learned from other\.cache\.targets"):
        train_tasks(config)


def test_a_student_of_several_tasks_is_told_where_its_caches_have_moved(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    places = {name: put(caches["first"], tmp_path / name) for name in ("one", "other")}
    places["further"] = put(caches["same"], tmp_path / "further")
    runs = train_tasks(make_tasks(tmp_path, **places))
    before = [(run / "model.safetensors").read_bytes() for run in runs]
    metrics = [evaluate(run) for run in runs]
    moved = {name: place.rename(tmp_path / f"moved-{name}") for name, place in places.items()}
    with pytest.raises(
        CacheError, match=r"run/one: its cache .* is not there; .*tasks\.NAME\.cache"
    ):
        evaluate(runs[0])
    config = make_tasks(tmp_path, **moved)
    assert train_tasks(config) == runs
    assert [(run / "model.safetensors").read_bytes() for run in runs] == before
    assert [evaluate(run) for run in runs] == metrics
    export(runs[1], "transformers", tmp_path / "export")
    put(caches["data"], moved["further"])
    with pytest.raises(MismatchError, match=r"run: learned from other\.further_teachers\.more"):
        train_tasks(config)


def test_a_run_is_told_where_its_caches_have_moved(caches: dict[str, Path], tmp_path: Path) -> None:
    put(caches["same"], tmp_path / "further")

    def make(**changes: Any) -> StudentConfig:
        where = changes.pop("further", "further")
        other = {"caches": {"other": {"cache": str(tmp_path / where)}}}
        return make_config(caches, tmp_path, further_teachers=other, **changes)

    config = make()
    run = train_student(config)
    weights = (run / "model.safetensors").read_bytes()
    before = evaluate(run)
    (tmp_path / "further").rename(tmp_path / "elsewhere")
    moved = make(further="elsewhere").model_copy(update={"cache": tmp_path / "moved"})
    config.cache.rename(moved.cache)
    with pytest.raises(CacheError, match=r"run: its cache .* is not there; .*--set cache=PLACE"):
        evaluate(run)
    assert train_student(moved) == run
    assert (run / "model.safetensors").read_bytes() == weights
    assert evaluate(run) == before
    with pytest.raises(ConfigError, match=r"run of another config \(seed: 0 there, 1 here\)"):
        train_student(moved.model_copy(update={"seed": 1}))
