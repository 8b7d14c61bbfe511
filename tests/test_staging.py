"""One config, several stages: each goes on from the weights of the one before, by its own rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_language_cache, make_student_config, open_student, read_lines
from small_teachers import make_tokenizer
from small_worlds import SIGNALS, TASK, WIDTHS, assert_close, make_example, make_student
from transformers import TrainerCallback

from pipeline.arguments import EvaluationConfig
from pipeline.batches import Collator, Selection
from pipeline.errors import ConfigError
from pipeline.losses import LOSSES
from pipeline.report.curves import curve_points
from pipeline.report.model import RunReport
from pipeline.runs import read_result
from pipeline.staging import TrainingStage
from pipeline.terms import projections_of
from pipeline.training import train_model
from stages.train_student import train_student

KL = {"name": "forward_kl"}
HIDDEN = {"name": "hidden_mse", "layers": {1: -1}}
LABELS = {"name": "cross_entropy"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_cache(tmp_path_factory.mktemp("cache"))


def test_two_stages_are_two_runs_the_second_from_the_first(cache: Path, tmp_path: Path) -> None:
    whole_batch = {"per_device_train_batch_size": 64, "lr_scheduler_type": "linear"}
    first: dict[str, Any] = {"losses": [HIDDEN], "training": {"max_steps": 3}}
    second: dict[str, Any] = {
        "losses": [KL, LABELS],
        "freeze": ["*embed_tokens*"],
        "learning_rates": {"layer_decay": 0.5},
        "training": {"learning_rate": 3e-3, "max_steps": 2},
    }

    def alone(name: str, stage: dict[str, Any], **changes: Any) -> Path:
        changes |= {**stage, "training": {**whole_batch, **stage["training"]}}
        return train_student(make_student_config(cache, tmp_path / name, **changes))

    one = alone("one", first)
    two = alone("two", second, student={"from": "pretrained", "model": str(one)})
    both = train_student(
        make_student_config(
            cache, tmp_path / "both", losses=None, stages=[first, second], training=whole_batch
        )
    )
    expected, found = (open_student(run).state_dict() for run in (two, both))
    assert_close(found, expected, 1e-5)
    embeddings = [name for name in found if "embed_tokens" in name]
    started = open_student(one).state_dict()
    assert all(torch.equal(found[name], started[name]) for name in embeddings)
    result = read_result(both)
    assert result.training["steps"] == 5
    assert result.metric("loss") == pytest.approx(read_result(two).metric("loss"), rel=1e-4)
    assert not (both / "checkpoints").exists()


def test_the_curve_counts_on_and_says_the_stage(cache: Path, tmp_path: Path) -> None:
    stages = [
        {"losses": [HIDDEN], "until": 0.25, "name": "hidden"},
        {"losses": [KL], "until": 0.5},
        {"losses": [LABELS], "training": {"logging_steps": 2}},
    ]
    run = train_student(
        make_student_config(
            cache,
            tmp_path / "run",
            losses=None,
            stages=stages,
            evaluation={"every": 1},
            training={"max_steps": 8},
        )
    )
    curve = read_lines(run)
    assert [(line["stage"], line["step"]) for line in curve if line["split"] == "eval"] == [
        *(("hidden", step) for step in (1, 2)),
        *(("2", step) for step in (3, 4)),
        *(("3", step) for step in (5, 6, 7, 8)),
    ]
    train = [line for line in curve if line["split"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 6, 8]
    assert {(line["stage"], key) for line in train for key in line if "/" in key} == {
        ("hidden", "term/hidden_mse"),
        ("2", "term/forward_kl"),
        ("3", "term/cross_entropy"),
    }
    epochs = [line["epoch"] for line in curve]
    seconds = [line["seconds"] for line in curve]
    assert epochs == sorted(epochs) and seconds == sorted(seconds)
    result = read_result(run)
    assert [x for x, _ in curve_points(curve, "loss", "step")] == list(range(1, 9))
    assert RunReport("run", result, curve).is_distilled
    assert [loss["name"] for loss in result.losses] == ["hidden_mse", "forward_kl", "cross_entropy"]
    assert "hidden_mse" in (run / "README.md").read_text(encoding="utf-8")


class _Record(TrainerCallback):
    """The projections as each stage begins and ends, and the examples that its steps took."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def _keep(self, model: torch.nn.Module) -> None:
        state = projections_of(model).state_dict()
        self.seen.append({name: value.clone() for name, value in state.items()})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(kwargs["model"])


class _Remember(Collator):
    """A collator that notes which examples it was given."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        SEEN.append([example.example_id for example in examples])
        return super().__call__(examples)


SEEN: list[list[str]] = []


def learn(output: Path, *stages: dict[str, Any]) -> _Record:
    """Train a tiny model on nine examples, three a step."""
    record = _Record()
    SEEN.clear()
    examples = Selection([make_example(number) for number in range(9)])
    planned = [
        TrainingStage(
            losses=[LOSSES[loss["name"]].model_validate(loss) for loss in stage["losses"]],
            train=examples,
            collator=_Remember(TASK, 0, SIGNALS),
            training={
                "per_device_train_batch_size": 3,
                "use_cpu": True,
                "max_steps": stage["steps"],
            },
            teacher_widths=WIDTHS,
            name=str(number),
            callbacks=[record],
        )
        for number, stage in enumerate(stages)
    ]
    train_model(
        make_student(),
        TASK,
        planned,
        {"test": Selection([make_example(20)])},
        make_tokenizer(),
        EvaluationConfig(),
        output,
    )
    return record


def test_projections_of_a_loss_that_stays_go_on_and_others_begin_anew(tmp_path: Path) -> None:
    other = {"name": "hidden_mse", "layers": {2: -1}}
    record = learn(
        tmp_path,
        {"losses": [KL, HIDDEN], "steps": 2},
        {"losses": [other, {**HIDDEN, "weight": 0.1}], "steps": 1},
    )
    begun, ended, second, _ = record.seen
    names = [name.removeprefix("1.") for name in begun]
    assert len(names) == 2
    for name in names:
        assert not torch.equal(begun[f"1.{name}"], ended[f"1.{name}"])
        assert torch.equal(second[f"1.{name}"], ended[f"1.{name}"])
    assert any(name.startswith("0.") for name in second)


def test_a_stage_goes_on_with_the_order_of_the_next_epoch(tmp_path: Path) -> None:
    learn(tmp_path / "one", {"losses": [KL], "steps": 6})
    whole = SEEN[:6]
    learn(tmp_path / "two", {"losses": [KL], "steps": 2}, {"losses": [KL], "steps": 3})
    assert SEEN[:2] == whole[:2]
    assert SEEN[2:5] == whole[3:6]
    assert whole[3:6] != whole[:3]


@pytest.mark.parametrize(
    ("stages", "top", "message"),
    [
        (None, None, "losses is missing; add it"),
        ([{"losses": [KL]}, {}], None, "stages.1.losses is missing; add it"),
        ([{"name": "a"}, {"name": "a"}], [KL], "stages.1.name: 'a' is the name of another"),
        ([{"until": 0.5}, {}, {}], [KL], "stages: end at 0.5, None, None of the steps; give each"),
        ([{"until": 0.5}, {"until": 0.2}, {}], [KL], "later than that of the stage before"),
        ([{"until": 0.5}, {"until": 0.9}], [KL], "stages: end at 0.5, 0.9 of the steps"),
        ([{"until": 0.5, "steps": 3}, {}], [KL], "its length is told by until and steps; choose"),
        (
            [{"steps": 3, "training": {"num_train_epochs": 1}}],
            [KL],
            "by steps and training.num_train_epochs",
        ),
        ([{"loses": [KL]}], [KL], "loses"),
    ],
)
def test_stages_that_make_no_training_are_refused(
    tmp_path: Path, stages: Any, top: Any, message: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        make_student_config(tmp_path, tmp_path / "run", losses=top, stages=stages)


def test_what_a_later_stage_asks_is_refused_before_the_first_step(
    cache: Path, tmp_path: Path
) -> None:
    stages = [{"steps": 1}, {"steps": 1, "freeze": ["model.layer.*"]}]
    config = make_student_config(cache, tmp_path / "run", stages=stages)
    with pytest.raises(ConfigError, match=r"freeze 'model.layer.\*' matches no parameter"):
        train_student(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    short = make_student_config(
        cache,
        tmp_path / "short",
        stages=[{"until": 0.1}, {}],
        training={"max_steps": 4},
    )
    with pytest.raises(ConfigError, match="stages: 1 ends at step 0 of 4, where it begins"):
        train_student(short)
