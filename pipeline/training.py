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
from torch import nn
from transformers.integrations import TensorBoardCallback

from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.batches import Collator, Selection
from pipeline.curve import Curve
from pipeline.errors import ConfigError, did_you_mean
from pipeline.evaluation import measure, score_model
from pipeline.freezing import Gradual
from pipeline.lockstep import Seat
from pipeline.losses.base import Loss
from pipeline.metrics import Metric
from pipeline.optimizing import LearningRates
from pipeline.resuming import last_checkpoint
from pipeline.student.key_values import without_cache
from pipeline.tasks.base import Scores, Task
from pipeline.terms import PROJECTIONS
from pipeline.trainer import DistillationTrainer


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
    learning_rates: LearningRates | None = None,
    gradual: Gradual | None = None,
    save_dtype: torch.dtype = torch.float32,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    seat: Seat | None = None,
) -> Outcome:
    """Train, resuming from the last checkpoint in the folder; save; measure what was saved.

    Args:
        model: the student, with the losses' projections attached.
        train: examples to learn from; held_out: split name -> examples to measure on.
        training: names and values of transformers.TrainingArguments.
        learning_rates: of parts of the model that do not learn at `training.learning_rate`.
        gradual: lets layers learn one after the other.
        save_dtype: precision of the weights in the finished folder.
        callbacks: of transformers, for instance to show progress.
        seat: among students that read their batches together.

    Raises:
        ConfigError: a setting or split does not exist.
        NumericalError: the loss is not finite.
    """
    task.require_packages()
    args = training_arguments(training, evaluation, output)
    resume, curve_file = last_checkpoint(output), Curve(output / "metrics.jsonl")
    last_step = int(resume.rpartition("-")[2]) if resume else -1
    seconds_before = curve_file.cut(last_step) if args.process_index == 0 else 0.0
    final = _held_out(held_out, evaluation.split, "split")
    _require_columns(final, evaluation.slices, "slices")
    curve = _held_out(held_out, evaluation.curve_split or evaluation.split, "curve_split")
    curve, columns = _curve_examples(curve, evaluation), evaluation.curve_columns
    _require_columns(curve, columns, "curve_slices")
    # One teacher measures, every example alike.
    plain = dataclasses.replace(collator, signals={}, company=None, marks=None)
    shared: dict[str, Any] = {
        "rank": args.process_index,
        "world_size": args.world_size,
        "tokenizer": tokenizer,
    }

    def measure_curve(student: nn.Module) -> list[Metric]:
        scores = score_model(student, curve, plain, evaluation.batch_size, **shared)
        return measure(task, scores, columns)

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
            curve=curve_file,
            seconds_before=seconds_before,
            learning_rates=learning_rates,
            seat=seat,
            gradual=gradual,
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


def _held_out(held_out: Mapping[str, Selection], split: str, setting: str) -> Selection:
    if split not in held_out:
        hint = did_you_mean(split, held_out)
        raise ConfigError(f"evaluation.{setting}: there is no split {split!r}{hint}")
    return held_out[split]


def _require_columns(examples: Selection, columns: Sequence[str], setting: str) -> None:
    """Refuse a slice by a column that is not there, before anything is trained for it."""
    known = examples[0].columns if columns and len(examples) else {}
    for column in columns:
        if column not in known:
            hint = did_you_mean(column, known) if known else "; data.carry takes columns along"
            raise ConfigError(f"evaluation.{setting}: no example has a column {column!r}{hint}")


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
