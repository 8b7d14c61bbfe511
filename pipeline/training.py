"""One training run, from a built model to a finished folder: arguments, resuming, saving,
measuring.

    model + losses + examples -> DistillationTrainer -> from_pretrained folder -> metrics

Used by the stages that train a teacher and a student; neither knows more of training than this.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from pipeline.batches import Collator, Selection
from pipeline.config import StrictModel, dump_config
from pipeline.errors import ConfigError, did_you_mean
from pipeline.evaluation import measure, score_model
from pipeline.losses.base import Loss
from pipeline.metrics import Metric
from pipeline.tasks.base import Scores, Task
from pipeline.trainer import PROJECTIONS, DistillationTrainer


class EarlyStopping(StrictModel):
    """Stop when a metric of the curve has not improved `patience` times; keep the best."""

    metric: str = "loss"
    patience: int = Field(default=3, ge=1)


class EvaluationConfig(StrictModel):
    """What is measured on held-out examples.

    Attributes:
        split: the split the final metrics are taken on.
        curve_split: the split measured while training; `split` where left out.
        every: optimizer steps between two points of the curve; None for the end only.
        curve_examples: this many examples, evenly spread over the split, for each point.
        batch_size: examples per forward pass.
        slices: columns whose values get metrics of their own.
        early_stopping: on a metric of the curve.
    """

    split: str = "test"
    curve_split: str | None = None
    every: int | None = Field(default=None, ge=1)
    curve_examples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    slices: list[str] = []
    early_stopping: EarlyStopping | None = None


@dataclass(frozen=True)
class Outcome:
    """What a training run gave: final scores and metrics, and what it took.

    `seconds` is training alone, without evaluation; `tokens` counts input tokens, epochs included.
    """

    scores: Scores
    metrics: list[Metric]
    steps: int
    epochs: float
    seconds: float
    evaluation_seconds: float
    tokens: int
    device: str


def check_run_folder(output: Path, config: StrictModel) -> bool:
    """Whether the run in the folder is finished; a folder of another config is refused.

    Writes config.yaml into a new folder.

    Raises:
        ConfigError: the folder holds a run, finished or not, of another config.
    """
    path = output / "config.yaml"
    text = dump_config(config)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{output}: holds a run of another config ({_first_difference(path, text)}); choose"
            " another output, or delete the folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return (output / "result.json").is_file()


def training_arguments(
    settings: Mapping[str, Any], evaluation: EvaluationConfig, output: Path
) -> transformers.TrainingArguments:
    """transformers.TrainingArguments by their own names, over this project's defaults.

    Raises:
        ConfigError: a setting does not exist (with the nearest name) or does not fit.
    """
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    for name in settings:
        if name not in known:
            raise ConfigError(f"training.{name}: is no setting{did_you_mean(name, known)}")
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "logging_steps": evaluation.every or 50,
        "save_steps": evaluation.every or 500,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "eval_strategy": "steps" if evaluation.every else "no",
    }
    if evaluation.every:
        defaults["eval_steps"] = evaluation.every
    if evaluation.early_stopping:
        defaults |= _early_stopping_arguments(evaluation)
    fixed = {"output_dir": str(output / "checkpoints")}
    try:
        return transformers.TrainingArguments(**defaults | dict(settings) | fixed)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error


def train_model(
    model: transformers.PreTrainedModel,
    task: Task,
    losses: Sequence[Loss],
    train: Selection,
    held_out: Mapping[str, Selection],
    collator: Collator,
    tokenizer: Any,
    training: Mapping[str, Any],
    evaluation: EvaluationConfig,
    output: Path,
    save_dtype: torch.dtype = torch.float32,
) -> Outcome:
    """Train, resuming from the last checkpoint in the folder; save; measure.

    Args:
        model: the student, with the losses' projections attached.
        train: examples to learn from; held_out: split name -> examples to measure on.
        training: names and values of transformers.TrainingArguments.
        save_dtype: precision of the weights in the finished folder.
    """
    args = training_arguments(training, evaluation, output)
    resume = _last_checkpoint(output)
    _cut_curve(output / "metrics.jsonl", resume)
    curve = _curve_examples(held_out[evaluation.curve_split or evaluation.split], evaluation)
    plain = dataclasses.replace(collator, signals={})  # held-out measurement reads no hidden states
    rank = {"rank": args.process_index, "world_size": args.world_size}

    def measure_curve(student: nn.Module) -> list[Metric]:
        return measure(task, score_model(student, curve, plain, evaluation.batch_size, **rank))

    callbacks = []
    if evaluation.early_stopping:
        callbacks.append(transformers.EarlyStoppingCallback(evaluation.early_stopping.patience))
    trainer = DistillationTrainer(
        model,
        losses,
        train,
        collator,
        args,
        evaluate_model=measure_curve if evaluation.every else None,
        metrics_file=output / "metrics.jsonl",
        callbacks=callbacks,
    )
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - began - trainer.seconds_evaluating
    model.eval()
    delattr(model, PROJECTIONS)
    scores = score_model(model, held_out[evaluation.split], plain, evaluation.batch_size, **rank)
    if trainer.is_world_process_zero():
        model.to(save_dtype).save_pretrained(output)
        tokenizer.save_pretrained(output)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return Outcome(
        scores=scores,
        metrics=measure(task, scores, evaluation.slices),
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=seconds,
        evaluation_seconds=trainer.seconds_evaluating,
        tokens=_tokens_seen(trainer, train),
        device=str(args.device),
    )


def _early_stopping_arguments(evaluation: EvaluationConfig) -> dict[str, Any]:
    stopping = evaluation.early_stopping
    assert stopping is not None
    if evaluation.every is None:
        raise ConfigError(
            "evaluation.early_stopping: needs evaluation.every; say after how many steps"
        )
    lower = stopping.metric in ("loss", "perplexity", "kl_to_teacher", "ece")
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{stopping.metric}",
        "greater_is_better": not lower,
    }


def _first_difference(path: Path, text: str) -> str:
    there = path.read_text(encoding="utf-8").splitlines()
    here = text.splitlines()
    for old, new in zip(there, here, strict=False):
        if old != new:
            return f"{old.strip()!r} there, {new.strip()!r} here"
    return f"{len(there)} lines there, {len(here)} here"


def _last_checkpoint(output: Path) -> str | None:
    folder = output / "checkpoints"
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _cut_curve(path: Path, resume: str | None) -> None:
    """Drop the lines of steps that will be taken again."""
    if not path.is_file():
        return
    last = int(resume.rpartition("-")[2]) if resume else -1
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= last]
    path.write_text("".join(kept), encoding="utf-8")


def _curve_examples(examples: Selection, evaluation: EvaluationConfig) -> Selection:
    wanted = evaluation.curve_examples
    if wanted is None or wanted >= len(examples):
        return examples
    picked = [index * len(examples) // wanted for index in range(wanted)]
    return Selection(examples.source, examples.indices[picked])


def _tokens_seen(trainer: DistillationTrainer, train: Selection) -> int:
    """Input tokens of all steps: the epochs taken, times the tokens of one epoch."""
    per_epoch = sum(len(train[index].input_ids) for index in range(len(train)))
    return round(per_epoch * float(trainer.state.epoch or 0.0))
