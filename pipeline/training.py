"""One training run, from a built model to a finished folder: arguments, resuming, saving,
measuring.

    model + losses + examples -> DistillationTrainer -> from_pretrained folder -> metrics

Used by the stages that train a teacher and a student; neither knows more of training than this.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field
from torch import nn
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations

from pipeline.batches import Collator, Selection
from pipeline.config import StrictModel
from pipeline.errors import ConfigError, did_you_mean
from pipeline.evaluation import measure, score_model
from pipeline.losses.base import Loss
from pipeline.metrics import Metric
from pipeline.resuming import cut_curve, last_checkpoint
from pipeline.student.key_values import without_cache
from pipeline.tasks.base import Scores, Task
from pipeline.terms import PROJECTIONS
from pipeline.trainer import DistillationTrainer


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

    `seconds` is training alone, without evaluation, earlier sessions of a continued run included;
    `tokens` counts input tokens, epochs included; `writes` says whether this process is the one
    that writes the folder (the first of several).
    """

    scores: Scores
    metrics: list[Metric]
    steps: int
    epochs: float
    seconds: float
    evaluation_seconds: float
    tokens: int
    device: str
    writes: bool = True


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
        "run_name": output.name,
        "disable_tqdm": True,
        "log_level": "error",
        "logging_nan_inf_filter": False,  # the trainer stops at the first of them
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Projections are used outside forward(), where DDP would take them for unused.
        "ddp_find_unused_parameters": False,
        "eval_strategy": "steps" if evaluation.every else "no",
    }
    if evaluation.every:
        defaults["eval_steps"] = evaluation.every
    if evaluation.early_stopping:
        defaults |= _early_stopping_arguments(evaluation)
    fixed = {"output_dir": str(output / "checkpoints")}
    try:
        args = transformers.TrainingArguments(**defaults | dict(settings) | fixed)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error
    installed = set(get_available_reporting_integrations())
    for name in args.report_to:
        if name not in installed:
            hint = did_you_mean(name, installed)
            raise ConfigError(f"training.report_to: {name} is not installed here{hint}; install it")
    return args


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
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Outcome:
    """Train, resuming from the last checkpoint in the folder; save; measure what was saved.

    Args:
        model: the student, with the losses' projections attached.
        train: examples to learn from; held_out: split name -> examples to measure on.
        training: names and values of transformers.TrainingArguments.
        save_dtype: precision of the weights in the finished folder.
        callbacks: of transformers, for instance to show progress.

    Raises:
        ConfigError: a setting or split does not exist.
        NumericalError: the loss is not finite.
    """
    args = training_arguments(training, evaluation, output)
    resume, curve_file = last_checkpoint(output), output / "metrics.jsonl"
    seconds_before = cut_curve(curve_file, resume) if args.process_index == 0 else 0.0
    final = _held_out(held_out, evaluation.split, "split")
    curve = _held_out(held_out, evaluation.curve_split or evaluation.split, "curve_split")
    curve = _curve_examples(curve, evaluation)
    plain = dataclasses.replace(collator, signals={})  # held-out measurement reads no hidden states
    shared: dict[str, Any] = {
        "rank": args.process_index,
        "world_size": args.world_size,
        "tokenizer": tokenizer,
    }

    def measure_curve(student: nn.Module) -> list[Metric]:
        return measure(task, score_model(student, curve, plain, evaluation.batch_size, **shared))

    stopping = evaluation.early_stopping
    patience = [transformers.EarlyStoppingCallback(stopping.patience)] if stopping else []
    with without_cache(model):
        trainer = DistillationTrainer(
            model,
            losses,
            train,
            collator,
            args,
            evaluate_model=measure_curve if evaluation.every else None,
            metrics_file=curve_file,
            seconds_before=seconds_before,
            callbacks=[*patience, *_reporters(args, output), *callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
    seconds = trainer.seconds_training
    delattr(model, PROJECTIONS)
    _round_weights(model.eval(), save_dtype)
    scores = score_model(model, final, plain, evaluation.batch_size, **shared)
    if trainer.is_world_process_zero():
        model.to(save_dtype).save_pretrained(output)
        tokenizer.save_pretrained(output)
    return Outcome(
        scores=scores,
        metrics=measure(task, scores, evaluation.slices),
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=seconds,
        evaluation_seconds=trainer.seconds_evaluating,
        tokens=trainer.state.num_input_tokens_seen,
        device=str(args.device),
        writes=trainer.is_world_process_zero(),
    )


def _reporters(
    args: transformers.TrainingArguments, output: Path
) -> list[transformers.TrainerCallback]:
    """TensorBoard's files beside the curve: the folder of checkpoints, its default, is removed."""
    if "tensorboard" not in args.report_to or os.getenv("TENSORBOARD_LOGGING_DIR"):
        return []
    args.report_to = [name for name in args.report_to if name != "tensorboard"]
    writer = TensorBoardCallback()
    writer.logging_dir = str(output / "tensorboard")
    return [writer]


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
        "restore_callback_states_from_checkpoint": True,  # how long it has been patient
    }


def _held_out(held_out: Mapping[str, Selection], split: str, setting: str) -> Selection:
    if split not in held_out:
        hint = did_you_mean(split, held_out)
        raise ConfigError(f"evaluation.{setting}: there is no split {split!r}{hint}")
    return held_out[split]


@torch.no_grad()
def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round parameters as saving will; buffers are made anew when a model is loaded."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _curve_examples(examples: Selection, evaluation: EvaluationConfig) -> Selection:
    wanted = evaluation.curve_examples
    if wanted is None or wanted >= len(examples):
        return examples
    picked = [index * len(examples) // wanted for index in range(wanted)]
    return Selection(examples.source, examples.indices[picked])
