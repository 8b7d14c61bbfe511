"""Any number of labels per text: each is a distribution over no and yes, exact as any other."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import TINY
from small_teachers import make_bert, make_rows, make_tokenizer, save_teacher, write_rows
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipeline.cache import TeacherCache
from pipeline.errors import DataError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.labels import CrossEntropy
from pipeline.runs import read_result
from pipeline.tasks import MultiLabelClassification, Scores
from pipeline.tasks.base import Task
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.inspect import inspect
from stages.train_student import StudentConfig, train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher

LABELS = ["bottles", "room", "students", "teacher"]
TASK = {"name": "multi-label-classification", "max_length": 48}


def make_data(root: Path) -> dict[str, Any]:
    """Texts with a list of the label words in them; some lists are empty."""
    rows = make_rows(60, longest=10)
    for row in rows:
        row["label"] = [word for word in LABELS if word in row["text"].split()]
    files = {
        name: str(write_rows(root / f"{name}.jsonl", part))
        for name, part in (("train", rows[:44]), ("test", rows[44:]))
    }
    splits = {name: name for name in files}
    return {"source": "json", "files": files, "splits": splits, "carry": ["text", "language"]}


def make_cache(root: Path, teacher: Path | None = None, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "output": root / "cache",
        "task": TASK,
        "data": make_data(root),
        "teacher": {"model": str(teacher or save_teacher(root / "teacher", make_bert(LABELS)))},
        "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
        "shard": {"examples": 25},
        **changes,
    }
    return cache_teacher(CacheConfig.model_validate(settings), progress=False)


def make_student(cache: Path, output: Path, **changes: Any) -> StudentConfig:
    settings = {
        "cache": str(cache),
        "output": str(output),
        "student": {"from": "scratch", "architecture": "bert", **TINY},
        "losses": [{"name": "forward_kl", "temperature": 2.0}, {"name": "cross_entropy"}],
        "training": {"learning_rate": 1e-2, "num_train_epochs": 2, "use_cpu": True},
        **changes,
    }
    return StudentConfig.model_validate(settings)


def test_lists_of_names_become_an_answer_for_each_label() -> None:
    task = MultiLabelClassification(labels=LABELS)
    rows = [
        {"id": 1, "text": "one", "label": [2, 0]},
        {"id": 2, "text": "one", "label": []},
        {"id": 3, "text": "one", "label": None},
        {"id": 4, "text": "one", "label": 3},
    ]
    examples = list(task.examples(rows, make_tokenizer(), []))
    found = [example.label_ids.tolist() for example in examples]
    assert found == [[1, 0, 1, 0], [0, 0, 0, 0], [-100] * 4, [0, 0, 0, 1]]
    assert task.batch(examples, 0).target_index.tolist() == list(range(16))
    assert [task.row(example)["label"] for example in examples] == [[0, 2], [], None, [3]]
    assert (task.num_classes(None), task.num_labels()) == (2, 4)
    with pytest.raises(DataError, match="example 5: label 4 is outside the label set of 4"):
        list(task.examples([{"id": 5, "text": "one", "label": [4]}], make_tokenizer(), []))


def test_a_softmax_over_no_and_yes_is_the_sigmoid(tmp_path: Path) -> None:
    """What the cache holds and the losses compare are transformers' own numbers."""
    model = make_bert(LABELS)
    cache = TeacherCache.open(make_cache(tmp_path))
    assert cache.manifest.label_names == LABELS
    for index in (0, 7, 59):
        example = cache[index]
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad():
            z = model(input_ids=ids).logits[0]
        for temperature in (1.0, 2.0):
            kept = example.targets.at(temperature)
            yes = kept.log_probs.gather(1, (kept.ids == 1).int().argmax(dim=1)[:, None])[:, 0]
            torch.testing.assert_close(yes, functional.logsigmoid(z / temperature))
        labels = torch.tensor([word in str(example.columns["text"]).split() for word in LABELS])
        logits = torch.stack([torch.zeros(4), z], dim=1)
        knowledge = Knowledge(example.targets, torch.from_numpy(example.label_ids).long())
        own = CrossEntropy().per_position(StudentOutputs(logits), knowledge, torch.nn.ModuleDict())
        expected = functional.binary_cross_entropy_with_logits(z, labels.float(), reduction="none")
        torch.testing.assert_close(own, expected)
        kl = ForwardKL().per_position(StudentOutputs(logits), knowledge, torch.nn.ModuleDict())
        torch.testing.assert_close(kl, torch.zeros(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "student",
    [
        {"architecture": "bert", **TINY},
        {"architecture": "hashed-bag", "tokenizer": {"buckets": 512}},
    ],
)
def test_a_student_opens_as_a_multi_label_classifier(
    tmp_path: Path, student: dict[str, Any]
) -> None:
    cache = make_cache(tmp_path)
    config = make_student(cache, tmp_path / "run", student={"from": "scratch", **student})
    run = train_student(config)
    settings = AutoConfig.from_pretrained(run)
    assert settings.problem_type == "multi_label_classification"
    assert list(settings.id2label.values()) == LABELS
    assert AutoModelForSequenceClassification.from_pretrained(run).num_labels == 4
    result = read_result(run)
    names = {"micro_f1", "macro_f1", "subset_accuracy", "loss", "ece", "agreement"}
    assert names <= {metric.name for metric in result.metrics}
    assert set(result.details["classification_report"]) == set(LABELS)
    told = {metric["name"] for metric in result.details["teacher"]["metrics"]}
    assert {"micro_f1", "subset_accuracy"} <= told
    assert [vars(m) for m in evaluate(run, device="cpu")] == [vars(m) for m in result.metrics]


def test_with_every_class_kept_a_student_learns_as_from_the_live_teacher(tmp_path: Path) -> None:
    """Binary KL from the cache has the gradient of binary cross-entropy with live targets."""
    cache = TeacherCache.open(make_cache(tmp_path))
    task: Task = MultiLabelClassification.model_validate(cache.manifest.task)
    teacher, examples = make_bert(LABELS), [cache[index] for index in range(8)]
    batch = task.batch(examples, 0)
    with torch.no_grad():
        live = torch.sigmoid(teacher(**batch.inputs).logits)
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (expected,) = torch.autograd.grad(
        functional.binary_cross_entropy_with_logits(z, live, reduction="sum"), z
    )
    targets = type(examples[0].targets).cat([example.targets for example in examples])
    rows = torch.stack([torch.zeros_like(z), z], dim=-1).flatten(0, 1)
    knowledge = Knowledge(targets, targets.label_ids)
    sums = ForwardKL().per_position(StudentOutputs(rows), knowledge, torch.nn.ModuleDict()).sum()
    (found,) = torch.autograd.grad(sums, z)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_teacher_is_trained_from_lists_of_labels_and_asked(tmp_path: Path) -> None:
    encoder = save_teacher(tmp_path / "encoder", make_bert(["a", "b"]))
    settings = {
        "output": str(tmp_path / "teacher"),
        "task": TASK,
        "data": make_data(tmp_path),
        "model": {"from": "pretrained", "model": str(encoder), "dropout": 0.0},
        "training": {"num_train_epochs": 20, "learning_rate": 5e-3, "use_cpu": True},
        "evaluation": {"split": "train"},
    }
    folder = train_teacher(TrainTeacherConfig.model_validate(settings))
    result = read_result(folder)
    assert float(result.metric("micro_f1") or 0.0) > 80
    cache = make_cache(tmp_path, teacher=folder)
    assert TeacherCache.open(cache).manifest.label_names == LABELS


def test_one_example_is_shown_label_by_label(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    written = StringIO()
    inspect(cache, TeacherCache.open(cache)[3].example_id, Console(width=80, file=written))
    shown = written.getvalue()
    assert all(label in shown for label in LABELS)


def test_figures_of_a_case_counted_by_hand() -> None:
    labels = np.array([[1, 0], [1, 1], [0, 0], [-100, -100]]).flatten()
    predictions = np.array([[1, 0], [0, 1], [0, 1], [1, 1]]).flatten()
    unknown = np.full(8, np.nan)
    scores = Scores(
        label_ids=labels,
        predictions=predictions,
        confidence=np.ones(8),
        label_log_probs=np.where(labels < 0, 0.0, -0.5),
        kl_to_teacher=unknown,
        agreement=unknown,
        columns={},
    )
    task = MultiLabelClassification(labels=["x", "y"])
    found = {metric.name: metric.value for metric in task.metrics(scores)}
    assert found["micro_f1"] == pytest.approx(100 * 2 * 2 / (3 + 3))  # 2 hits, 3 true, 3 said
    assert found["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert found["subset_accuracy"] == pytest.approx(100 / 3)
    assert found["loss"] == pytest.approx(0.5)
    report = task.details(scores)["classification_report"]
    assert report["x"] == {
        "precision": 100.0,
        "recall": 50.0,
        "f1": pytest.approx(200 / 3),
        "support": 2,
    }
    json.dumps(report)
    assert task.details(scores.where(labels < 0)) == {}
