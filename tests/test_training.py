"""A run from config to folder: what it learns, what it writes, what it refuses."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from small_runs import (
    TINY,
    count_tokens,
    make_language_cache,
    make_student_config,
    open_student,
    read_lines,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cache import TeacherCache, epoch_order
from pipeline.errors import ConfigError, StillroomError
from pipeline.runs import read_result
from pipeline.student import build_student
from stages.evaluate import evaluate
from stages.progress import TrainingProgress
from stages.train_student import read_cache, train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher

TWO_LAYERS = {"from": "scratch", "architecture": "llama", **TINY, "layers": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with every kind of loss and a curve."""
    losses = [
        {"name": "forward_kl", "weight": 0.9},
        {"name": "cross_entropy", "weight": 0.1},
        {"name": "hidden_mse", "layers": "uniform"},
    ]
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return train_student(make_student_config(cache, output, losses=losses, evaluation={"every": 2}))


def test_cached_training_equals_training_with_the_live_teacher(cache: Path, tmp_path: Path) -> None:
    config = make_student_config(
        cache, tmp_path / "run", training={"lr_scheduler_type": "constant"}
    )
    reading = read_cache(config)
    classes = reading.cache.manifest.num_classes
    student = build_student(config.student, reading.task, classes, reading.tokenizer, config.seed)
    teacher = AutoModelForCausalLM.from_pretrained(cache.parent / "teacher").eval()
    teacher.config.use_cache = student.config.use_cache = False
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    train = reading.select("train")
    steps = 0
    for epoch in range(2):
        order = epoch_order(len(train), 64, 0, epoch)
        for start in range(0, len(train), 8):
            examples = [train[int(row)] for row in order[start : start + 8]]
            batch = reading.task.batch(examples, 0)
            with torch.no_grad():
                said = teacher(**batch.inputs).logits.flatten(0, 1)[batch.target_index, :classes]
            mine = student(**batch.inputs).logits.flatten(0, 1)[batch.target_index, :classes]
            loss = functional.kl_div(
                mine.log_softmax(1), said.log_softmax(1), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            steps += 1
    train_student(config)
    found = open_student(tmp_path / "run").state_dict()
    assert steps == read_result(tmp_path / "run").training["steps"] > 3
    for name, expected in student.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=0.0, atol=3e-5, msg=name)


def test_the_folder_opens_whole_and_holds_no_projection(run: Path) -> None:
    with safe_open(run / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    assert names and not any("projection" in name for name in names)
    model, found = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.use_cache  # off while training only
    assert AutoTokenizer.from_pretrained(run).get_vocab()
    assert {"README.md", "config.yaml", "metrics.jsonl", "result.json"} <= {
        path.name for path in run.iterdir()
    }
    assert not (run / "checkpoints").exists()


def test_the_result_counts_what_was_read_and_can_be_measured_again(run: Path, cache: Path) -> None:
    result = read_result(run)
    assert result.training["tokens_seen"] == 2 * count_tokens(cache, "train")
    assert result.training["epochs"] == 2.0
    again = {metric.name: metric.value for metric in evaluate(run)}
    for metric in result.metrics:
        assert again[metric.name] == pytest.approx(metric.value, rel=1e-5)
    teacher = {m["name"]: m["value"] for m in result.details["teacher"]["metrics"]}
    assert teacher["loss"] > 0
    assert not {"kl_to_teacher", "agreement"} & set(teacher)


def test_the_last_point_of_the_curve_is_the_result(run: Path) -> None:
    last = [line for line in read_lines(run) if line["split"] == "eval"][-1]
    result = read_result(run)
    assert last["step"] == result.training["steps"]
    for name in ("loss", "kl_to_teacher", "agreement"):
        assert last[name] == pytest.approx(result.metric(name), rel=1e-5)


def test_the_evaluated_loss_of_the_training_batch_is_its_training_loss(
    cache: Path, tmp_path: Path
) -> None:
    config = make_student_config(
        cache,
        tmp_path / "run",
        losses=[{"name": "cross_entropy"}, {"name": "forward_kl"}],
        evaluation={"every": 1, "curve_split": "train", "batch_size": 3},
        training={
            "learning_rate": 0.0,
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 100,
        },
    )
    train_student(config)
    train, held_out = read_lines(tmp_path / "run")
    assert (train["split"], held_out["split"]) == ("train", "eval")
    assert train["term/cross_entropy"] == pytest.approx(held_out["loss"], rel=1e-5)
    assert train["term/forward_kl"] == pytest.approx(held_out["kl_to_teacher"], rel=1e-5)


def test_a_finished_run_is_left_alone(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    config = make_student_config(
        Path(read_result(run).config["cache"]),
        run,
        losses=read_result(run).config["losses"],
        evaluation={"every": 2},
    )
    assert train_student(config) == run
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match=r"holds a run of another config \(seed: 0 there, 1 h"):
        train_student(other)


def test_a_run_that_never_began_may_be_configured_anew(cache: Path, tmp_path: Path) -> None:
    wrong = {"name": "hidden_mse", "layers": {7: -1}}
    with pytest.raises(ConfigError, match="the student has no layer 7; it has 0"):
        train_student(make_student_config(cache, tmp_path / "run", losses=[wrong]))
    right = make_student_config(cache, tmp_path / "run", training={"max_steps": 1})
    assert (train_student(right) / "result.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"lerning_rate": 1.0}}, r"training.lerning_rate: .*mean 'learning_rate'\?"),
        ({"training": {"optim": "adamx"}}, "training: adamx is not a valid Opt"),
        ({"training": {"report_to": "tensorbord"}}, "report_to: .* did you mean 'tensorboard'"),
        (
            {"freeze": ["model.layer.*"]},
            r"freeze 'model.layer.\*' matches no .* mean 'model.layers",
        ),
        ({"losses": [{"name": "forward_kl", "temperature": 3.0}]}, r"temperature 3, .* holds 1, 2"),
        ({"losses": [{"name": "hidden_mse", "layers": {1: 1}}]}, r"'layer.1' \(it has layer.0, l"),
        ({"losses": [{"name": "hidden_mse", "layers": {1: 9}}]}, r"no layer 9; it has 0 .* to 2"),
        (
            {"student": TWO_LAYERS, "losses": [{"name": "hidden_mse", "layers": "uniform"}]},
            r"no hidden states 'layer.1' \(it has layer.0, layer.2\)",
        ),
        ({"losses": [{"name": "hidden_mse", "pooled": True}]}, "no hidden states 'pooled'"),
        ({"evaluation": {"split": "tset"}}, "has no split 'tset'; did you mean 'test'"),
        ({"evaluation": {"early_stopping": {}}}, "early_stopping: needs evaluation.every"),
        (
            {"evaluation": {"every": 1, "early_stopping": {"metric": "los"}}},
            "early_stopping.metric 'los' is not measured; did you mean 'loss'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    cache: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StillroomError, match=message) as refused:
        train_student(make_student_config(cache, tmp_path / "run", **changes))
    assert "\n" not in str(refused.value)


def test_a_damaged_or_foreign_target_stops_the_training(tmp_path: Path) -> None:
    cache = make_language_cache(tmp_path)
    rows = next(cache.glob("shards/*/rows.arrow"))
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(data)
    with pytest.raises(StillroomError, match="damaged"):
        train_student(make_student_config(cache, tmp_path / "run"))


def test_only_the_first_examples_of_the_split_are_learned(cache: Path, tmp_path: Path) -> None:
    settings = {"max_examples": 3, "training": {"num_train_epochs": 1}}
    run = train_student(make_student_config(cache, tmp_path / "run", **settings))
    opened = TeacherCache.open(cache)
    first = [opened[int(row)] for row in opened.split_indices("train")[:3]]
    tokens = sum(len(example.input_ids) for example in first)
    assert read_result(run).training["tokens_seen"] == tokens


def test_frozen_weights_are_bit_equal_and_the_rest_learns(cache: Path, tmp_path: Path) -> None:
    config = make_student_config(cache, tmp_path / "run", freeze=["*embed_tokens*", "*mlp*"])
    reading = read_cache(config)
    first = build_student(config.student, reading.task, 300, reading.tokenizer, config.seed)
    after = open_student(train_student(config)).state_dict()
    for name, before in first.state_dict().items():
        frozen = "embed_tokens" in name or "mlp" in name
        assert torch.equal(before, after[name]) == frozen, name


def test_early_stopping_stops_and_keeps_the_best(cache: Path, tmp_path: Path) -> None:
    config = make_student_config(
        cache,
        tmp_path / "run",
        evaluation={"every": 1, "early_stopping": {"patience": 2, "metric": "kl_to_teacher"}},
        training={"learning_rate": 0.3, "lr_scheduler_type": "constant", "num_train_epochs": 30},
    )
    result = read_result(train_student(config))
    curve = [x["kl_to_teacher"] for x in read_lines(tmp_path / "run") if x["split"] == "eval"]
    best = int(np.argmin(curve))
    assert len(curve) == result.training["steps"] == best + 3 < 60
    assert result.metric("kl_to_teacher") == pytest.approx(curve[best], rel=1e-5)


def test_a_training_says_one_line_a_log_and_transformers_nothing(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_student_config(
        cache, tmp_path / "demo-kd", evaluation={"every": 2}, training={"max_steps": 4}
    )
    train_student(config)
    said = capfd.readouterr()
    assert said.err == ""
    first, last = said.out.splitlines()
    assert first.startswith("demo-kd  step 2/4  loss ")
    assert "  held-out loss " in first
    assert first.split("  ")[-2].endswith(" ms/step")
    assert last.endswith("ETA 0:00")


def test_tensorboard_gets_every_term_and_keeps_its_file(cache: Path, tmp_path: Path) -> None:
    training = {"report_to": "tensorboard", "max_steps": 2, "logging_steps": 1}
    config = make_student_config(cache, tmp_path / "run", training=training)
    train_student(config)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"term/forward_kl") == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_without_evaluation_a_line_is_shown_at_once() -> None:
    out = io.StringIO()
    progress = TrainingProgress("tiny", Console(file=out, width=200))
    state = type("State", (), {"global_step": 0, "max_steps": 9, "is_world_process_zero": True})()
    control = type("Control", (), {"should_evaluate": False})()
    progress.on_train_begin(None, state, control)
    state.global_step = 3
    progress.on_log(None, state, control, {"loss": 1.2345})
    assert out.getvalue().startswith("tiny  step 3/9  loss 1.23  ")


def test_a_teacher_is_trained_from_labels_alone_and_measured_as_it_is_saved(
    cache: Path, tmp_path: Path
) -> None:
    config = TrainTeacherConfig.model_validate(
        {
            "output": str(tmp_path / "teacher"),
            "task": {"name": "causal-lm", "block_size": 32},
            "data": {
                "source": "json",
                "files": {name: str(cache.parent / f"{name}.jsonl") for name in ("train", "test")},
                "splits": {"train": "train", "test": "test"},
            },
            "model": {
                "from": "scratch",
                "architecture": "llama",
                "layers": 1,
                "hidden_size": 16,
                "heads": 2,
                "intermediate_size": 24,
            },
            "tokenizer": {"vocab_size": 260},
            "label_smoothing": 0.1,
            "training": {"num_train_epochs": 1, "use_cpu": True, "logging_steps": 1},
            "dtype": "float16",
        }
    )
    run = train_teacher(config)
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.dtype == torch.float16
    result = read_result(run)
    assert result.kind == "teacher"
    assert result.metric("kl_to_teacher") is None
    assert result.metric("perplexity") == pytest.approx(np.exp(result.metric("loss")))
    no_split = config.model_copy(update={"output": tmp_path / "x"})
    no_split.evaluation.__dict__["split"] = "validation"
    with pytest.raises(ConfigError, match=r"evaluation.split: there is no split 'validation'"):
        train_teacher(no_split)
