"""One student of several tasks: one encoder, a head each, batches dealt by weight."""

import os
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import TINY, make_data, read_lines
from small_teachers import make_bert, save_teacher
from test_masked_lm import make_masked_teacher, make_masking_tokenizer
from transformers import BertForMaskedLM, BertForSequenceClassification, TrainerCallback

from pipeline.batches import StepSampler
from pipeline.config import parse_config
from pipeline.errors import CacheError, ConfigError, LockError, MismatchError
from pipeline.lessons import LessonsTrainer, MixedSampler
from pipeline.locking.locks import occupy
from pipeline.runs import read_result
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.train_tasks import TasksConfig, train_tasks


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier's cache and one of filled masks, by one tokenizer."""
    root = tmp_path_factory.mktemp("tasks")
    classifier = make_bert()
    classifier.resize_token_embeddings(301)
    data, made = make_data(root), {}
    for name, model, task in (
        ("topics", classifier, {"name": "sequence-classification", "max_length": 48}),
        ("masks", make_masked_teacher(), {"name": "masked-lm", "max_length": 48}),
    ):
        save_teacher(root / f"{name}-teacher", model, make_masking_tokenizer())
        config = {
            "output": str(root / name),
            "task": task,
            "data": data,
            "teacher": {"model": str(root / f"{name}-teacher")},
            "targets": {"top_k": 3},
            "hidden": {"pooled": name == "topics", "dtype": "float32"},
        }
        made[name] = cache_teacher(CacheConfig.model_validate(config), progress=False)
    return made


def make_config(caches: dict[str, Path], output: Path, **changes: Any) -> TasksConfig:
    settings: dict[str, Any] = {
        "output": str(output),
        "student": {
            "from": "scratch",
            "architecture": "bert",
            "dropout": 0.1,
            **TINY,
            "settings": {"max_position_embeddings": 64},
        },
        "tasks": {
            "topics": {
                "cache": str(caches["topics"]),
                "losses": [{"name": "forward_kl"}, {"name": "hidden_mse", "pooled": True}],
                "share": 2.0,
            },
            "masks": {"cache": str(caches["masks"]), "losses": [{"name": "forward_kl"}]},
        },
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True},
        "evaluation": {"every": 3},
        **changes,
    }
    return parse_config(TasksConfig, settings, "tasks")


def encoder(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.bert.named_parameters() if "pooler" not in name}


@pytest.fixture(scope="module")
def runs(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return train_tasks(make_config(caches, tmp_path_factory.mktemp("run")))


def open_both(runs: list[Path]) -> tuple[Any, Any]:
    topics, masks = runs
    return (
        BertForSequenceClassification.from_pretrained(topics),
        BertForMaskedLM.from_pretrained(masks),
    )


def test_the_finished_students_share_their_encoder(runs: list[Path]) -> None:
    first, second = (encoder(model) for model in open_both(runs))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_each_task_is_an_ordinary_run(runs: list[Path]) -> None:
    topics, masks = (read_result(run) for run in runs)
    assert (topics.task, masks.task) == ("sequence-classification", "masked-lm")
    again = {metric.name: metric.value for metric in evaluate(runs[0], device="cpu")}
    for metric in topics.metrics:
        assert again[metric.name] == pytest.approx(metric.value, abs=1e-5)


def test_the_curve_has_every_task(runs: list[Path]) -> None:
    lines = read_lines(runs[0].parent)
    held_out = [line for line in lines if line["split"] == "eval"]
    assert {"topics.accuracy", "masks.pseudo_perplexity"} <= set(held_out[-1])
    trained = next(line for line in lines if line["split"] == "train")
    assert {"term/topics/forward_kl", "term/topics/hidden_mse", "term/masks/forward_kl"} <= set(
        trained
    )


def test_what_is_measured_is_chosen_and_checked_as_for_one_task(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    other_split = make_config(caches, tmp_path / "a", evaluation={"curve_split": "dev"})
    with pytest.raises(CacheError, match="has no split 'dev'"):
        train_tasks(other_split)
    other_column = make_config(caches, tmp_path / "b", evaluation={"slices": ["dialect"]})
    with pytest.raises(ConfigError, match=r"evaluation\.slices: no example has a column 'dialect'"):
        train_tasks(other_column)


def test_students_of_several_tasks_are_trained_by_one_process_at_a_time(
    caches: dict[str, Path], runs: list[Path], tmp_path: Path
) -> None:
    with (
        occupy(tmp_path / "run", "train-tasks"),
        pytest.raises(LockError, match=rf"process {os.getpid()} on .* or choose another output"),
    ):
        train_tasks(make_config(caches, tmp_path / "run"))
    with occupy(runs[0].parent, "train-tasks"):  # what is finished is left as it is
        assert train_tasks(make_config(caches, runs[0].parent)) == runs


def test_a_finished_task_is_not_written_again_while_another_is_finished(
    caches: dict[str, Path], runs: list[Path], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(runs[0].parent, tmp_path / "run"))
    (output / "masks" / "result.json").unlink()  # as after a kill between the two
    finished = [file for file in (output / "topics").iterdir() if file.name != "config.yaml"]
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in finished}
    train_tasks(make_config(caches, output))
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in finished} == before
    for run, whole in zip((output / "topics", output / "masks"), runs, strict=True):
        weights = [(folder / "model.safetensors").read_bytes() for folder in (run, whole)]
        assert weights[0] == weights[1]


class Stop(TrainerCallback):
    """Fail after some steps, as a machine does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_an_interrupted_run_whose_cache_moved_continues_to_the_same_weights(
    caches: dict[str, Path], runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = LessonsTrainer.__init__

    def interrupted(self: LessonsTrainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_callback(Stop())

    output, place = tmp_path / "run", tmp_path / "masks"
    shutil.copytree(caches["masks"], place)
    with monkeypatch.context() as patch:
        patch.setattr(LessonsTrainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_tasks(make_config({**caches, "masks": place}, output))
    assert not (output / "topics").exists()
    moved = {**caches, "masks": place.rename(tmp_path / "elsewhere")}
    swapped = {"topics": moved["masks"], "masks": moved["topics"]}
    with pytest.raises(MismatchError, match=r"run: learned from (masks|topics)\.cache\."):
        train_tasks(make_config(swapped, output))
    continued = train_tasks(make_config(moved, output))
    for one, other in zip(open_both(continued), open_both(runs), strict=True):
        for (name, value), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(value, expected), name


def test_a_finished_run_is_kept(caches: dict[str, Path], runs: list[Path]) -> None:
    before = (runs[0] / "model.safetensors").stat().st_mtime_ns
    assert train_tasks(make_config(caches, runs[0].parent)) == runs
    assert (runs[0] / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_of_another_config_is_refused_and_stays_as_it_is(
    caches: dict[str, Path], runs: list[Path]
) -> None:
    output = runs[0].parent
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    tasks = make_config(caches, output).model_dump(mode="json")["tasks"]
    shared, third = (
        {**tasks, "topics": {**tasks["topics"], "share": 1.0}},
        {**tasks, "more": tasks["masks"]},
    )
    for changes, found in (
        ({"seed": 1}, r"seed: 0 there, 1 here"),
        ({"tasks": shared}, r"tasks\.topics\.share: 2\.0 there, 1\.0 here"),
        ({"tasks": third}, r"tasks\.more\."),
    ):
        with pytest.raises(ConfigError, match=rf"holds a run of another config \({found}"):
            train_tasks(make_config(caches, output, **changes))
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_an_epoch_deals_batches_by_weight_and_skips_no_row(
    sizes: list[int], weights: list[float], seed: int, epoch: int
) -> None:
    weights = weights[: len(sizes)]

    def make() -> MixedSampler:
        return MixedSampler([StepSampler(size, 4, seed) for size in sizes], weights, seed)

    sampler = make()
    total = sum(-(-size // 4) for size in sizes)
    assert len(sampler) == total
    seen: list[Counter[int]] = [Counter() for _ in sizes]
    for number in range(epoch + 1):
        sampler.set_epoch(number)
        batches = [list(batch) for batch in sampler]
        assert len(batches) == total
        turns = Counter(batch[0][0] for batch in batches)
        for lesson, weight in enumerate(weights):
            assert abs(turns[lesson] - total * weight / sum(weights)) < 1.0
        for batch in batches:
            assert len({lesson for lesson, _ in batch}) == 1
            seen[batch[0][0]].update(row for _, row in batch)
    for counted, size in zip(seen, sizes, strict=True):
        times = [counted[row] for row in range(size)]
        assert max(times) - min(times) <= 1  # every row of a lesson before any comes again
    again = make()
    again.set_epoch(epoch)
    assert [list(batch) for batch in islice(again, total)] == batches


def test_tasks_that_cannot_share_an_encoder_are_refused(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    tasks = {
        name: {"cache": str(caches[name]), "losses": [{"name": "forward_kl"}]} for name in caches
    }
    with pytest.raises(ConfigError, match="is no name of a folder"):
        make_config(caches, tmp_path / "b", tasks={"a/b": tasks["topics"], "c": tasks["masks"]})
    other = tmp_path / "other"
    save_teacher(other / "teacher", make_bert())
    settings = {
        "output": str(other / "cache"),
        "task": {"name": "sequence-classification", "max_length": 48},
        "data": make_data(tmp_path),
        "teacher": {"model": str(other / "teacher")},
        "targets": {"top_k": 3},
    }
    cache = cache_teacher(CacheConfig.model_validate(settings), progress=False)
    mixed = {"topics": {**tasks["topics"], "cache": str(cache)}, "masks": tasks["masks"]}
    with pytest.raises(MismatchError, match=r"tasks\.masks: reads with tokenizer"):
        train_tasks(make_config(caches, tmp_path / "c", tasks=mixed))
