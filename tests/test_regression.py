"""Numbers of a text: kept as the teacher gave them, learned from it or from the data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import TINY
from small_teachers import make_bert, make_rows, make_tokenizer, save_teacher, write_rows
from transformers import AutoConfig

from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, DataError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.numbers import LabelMSE, OutputMSE
from pipeline.outputs import read_knowledge
from pipeline.runs import read_result
from pipeline.tasks import Scores, SequenceRegression
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.train_student import StudentConfig, read_cache, train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher

TASK = {"name": "sequence-regression", "max_length": 48}
TWO = {**TASK, "outputs": ["length", "score"]}
NONE = torch.nn.ModuleDict()


def make_data(root: Path) -> dict[str, Any]:
    """Pairs of texts with two numbers, one of them an integer; every fourth has no score."""
    rows = make_rows(60, longest=8)
    for place, row in enumerate(rows):
        words = row["text"].split()
        row["text_pair"] = " ".join(words[:2])
        row["length"] = len(words)
        row["score"] = None if place % 4 == 3 else words.count("one") / 2
        del row["label"]
    files = {
        name: str(write_rows(root / f"{name}.jsonl", part))
        for name, part in (("train", rows[:44]), ("test", rows[44:]))
    }
    splits = {name: name for name in files}
    columns = {"length": "length"}
    carry = ["text", "text_pair", "language"]
    return {"source": "json", "files": files, "splits": splits, "carry": carry, "columns": columns}


def make_cache(root: Path, task: dict[str, Any] = TASK, **changes: Any) -> Path:
    names = SequenceRegression.model_validate(task).outputs
    settings: dict[str, Any] = {
        "output": root / "cache",
        "task": task,
        "data": make_data(root),
        "teacher": {"model": str(save_teacher(root / "teacher", make_bert(names)))},
        "shard": {"examples": 25},
        **changes,
    }
    return cache_teacher(CacheConfig.model_validate(settings), progress=False)


def make_student(cache: Path, output: Path, **changes: Any) -> StudentConfig:
    settings = {
        "cache": str(cache),
        "output": str(output),
        "student": {"from": "scratch", "architecture": "bert", **TINY},
        "losses": [{"name": "output_mse"}, {"name": "label_mse", "weight": 0.1}],
        "training": {"learning_rate": 2e-2, "num_train_epochs": 30, "use_cpu": True},
        **changes,
    }
    return StudentConfig.model_validate(settings)


@pytest.mark.parametrize("task", [TASK, TWO])
def test_the_cache_holds_the_teachers_outputs_bit_for_bit(
    tmp_path: Path, task: dict[str, Any]
) -> None:
    cache = TeacherCache.open(make_cache(tmp_path, task))
    names = task.get("outputs", ["score"])
    assert cache.manifest.targets.codec.name == "lossless"
    assert cache.manifest.num_classes == len(names)
    model, known = make_bert(names), SequenceRegression.model_validate(cache.manifest.task)
    for index in (0, 3, 59):
        batch = known.batch([cache[index]], 0)
        with torch.no_grad():
            expected = model(**batch.inputs).logits[0].numpy()
        found = known.recall(cache[index], None)["own"][0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_numbers_are_carried_and_told_to_the_losses(tmp_path: Path) -> None:
    config = make_student(make_cache(tmp_path, TWO), tmp_path / "run")
    reading = read_cache(config)
    assert reading.cache.manifest.columns["score"] == "float64"
    assert reading.cache.manifest.columns["length"] == "float64"
    examples = [reading.cache[index] for index in range(4)]
    batch = reading.collator(config.losses)(examples)
    assert batch["counts"][1] == 3  # the fourth has no score
    numbers = batch["numbers"]
    assert numbers[:, 0].tolist() == [len(str(e.columns["text"]).split()) for e in examples]
    assert numbers[3, 1].isnan() and not numbers[:3].isnan().any()
    outputs = StudentOutputs(torch.zeros(4, 2))
    found = LabelMSE().per_position(outputs, read_knowledge(batch), NONE)
    torch.testing.assert_close(found[:3], numbers[:3].square().mean(dim=1))
    assert found[3] == 0.0


def test_output_mse_compares_raw_outputs_in_their_order(tmp_path: Path) -> None:
    cache = TeacherCache.open(make_cache(tmp_path, TWO))
    task = SequenceRegression.model_validate(cache.manifest.task)
    example = cache[5]
    said = torch.from_numpy(task.recall(example, None)["own"])
    knowledge = Knowledge(example.targets, example.targets.label_ids)
    for shift in (0.0, 3.0):  # a shift of all outputs is no matter of indifference here
        found = OutputMSE().per_position(StudentOutputs(said + shift), knowledge, NONE)
        assert found.item() == pytest.approx(shift**2, abs=1e-9)


@pytest.mark.parametrize(
    "student",
    [
        {"architecture": "bert", **TINY},
        {"architecture": "distilbert", "layers": 1, "hidden_size": 16, "heads": 2},
        {"architecture": "hashed-bag", "tokenizer": {"buckets": 512}},
    ],
)
def test_a_student_learns_the_numbers_of_its_teacher(
    tmp_path: Path, student: dict[str, Any]
) -> None:
    cache = make_cache(tmp_path)
    config = make_student(
        cache,
        tmp_path / "run",
        student={"from": "scratch", "dropout": 0.0, **student},
        evaluation={"split": "train", "slices": ["language"]},
    )
    run = train_student(config)
    settings = AutoConfig.from_pretrained(run)
    assert (settings.problem_type, settings.num_labels) == ("regression", 1)
    result = read_result(run)
    measured = ("pearson", "spearman", "mse", "mae")
    names = {metric.name for metric in result.metrics}
    assert names == {*measured, *(f"{name}_to_teacher" for name in measured)}
    assert float(result.metric("pearson_to_teacher") or 0.0) > 0.3
    told = {metric["name"] for metric in result.details["teacher"]["metrics"]}
    assert told == set(measured)
    assert [vars(m) for m in evaluate(run, device="cpu")] == [vars(m) for m in result.metrics]


def test_a_teacher_is_trained_from_numbers_and_asked(tmp_path: Path) -> None:
    encoder = save_teacher(tmp_path / "encoder", make_bert(["one", "two", "three"]))
    settings = {
        "output": str(tmp_path / "trained"),
        "task": TASK,
        "data": make_data(tmp_path),
        "model": {"from": "pretrained", "model": str(encoder), "dropout": 0.0},
        "training": {"num_train_epochs": 12, "learning_rate": 3e-3, "use_cpu": True},
        "evaluation": {"split": "train"},
    }
    folder = train_teacher(TrainTeacherConfig.model_validate(settings))
    assert float(read_result(folder).metric("pearson") or 0.0) > 0.5
    cache = make_cache(tmp_path, teacher={"model": str(folder)})
    assert TeacherCache.open(cache).manifest.label_names == ["score"]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{"name": "forward_kl"}], "forward_kl compares classes, sequence-regression has numbers"),
        ([{"name": "cross_entropy"}], "use output_mse or label_mse"),
    ],
)
def test_losses_of_classes_are_refused(
    tmp_path: Path, losses: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_student(make_student(make_cache(tmp_path), tmp_path / "run", losses=losses))


def test_what_is_no_number_is_named() -> None:
    rows = [{"id": "7", "text": "one", "score": "high"}]
    with pytest.raises(DataError, match=r"example 7: has 'high' as its score, expected a number"):
        list(SequenceRegression().examples(rows, make_tokenizer(), []))


def test_figures_of_a_case_counted_by_hand() -> None:
    unknown = np.full(4, np.nan)
    scores = Scores(
        label_ids=np.array([0, 0, 0, -100]),
        predictions=np.zeros(4, dtype=np.int64),
        confidence=np.ones(4),
        label_log_probs=np.zeros(4),
        kl_to_teacher=unknown,
        agreement=unknown,
        columns={"score": np.array([1.0, 2.0, 4.0, None], dtype=object)},
        observed={"own": np.array([[1.0], [3.0], [5.0], [9.0]]), "said": unknown[:, None]},
    )
    found = {metric.name: metric.value for metric in SequenceRegression().metrics(scores)}
    assert found == {
        "pearson": pytest.approx(np.corrcoef([1, 3, 5], [1, 2, 4])[0, 1]),
        "spearman": pytest.approx(1.0),
        "mse": pytest.approx(2 / 3),
        "mae": pytest.approx(2 / 3),
    }
