"""One training run, from a built model to a finished folder: stages, resuming, saving, measuring.

    model + stages -> DistillationTrainer for each -> from_pretrained folder -> metrics

Used by the stages that train a teacher and a student; neither knows more of training than this.
"""

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
from pipeline.batches import Selection
from pipeline.curve import Curve
from pipeline.evaluation import measure
from pipeline.exam import Exam
from pipeline.lockstep import Seat
from pipeline.losses.base import Loss
from pipeline.metrics import Metric
from pipeline.resuming import (
    Taken,
    last_checkpoint,
    read_stage,
    save_stage,
    session_guards,
    step_of,
)
from pipeline.scores import Scores
from pipeline.staging import TrainingStage
from pipeline.student import Adapters
from pipeline.student.key_values import without_cache
from pipeline.tasks.base import Task
from pipeline.terms import PROJECTIONS, attach_projections, carry_projections
from pipeline.trainer import DistillationTrainer


@dataclass(frozen=True)
class Outcome:
    """What a training run gave: final scores and metrics, and what it took.

    `taken` counts all stages, earlier sessions of a continued run included; `writes` says whether
    this process is the one that writes the folder (the first of several).
    """

    scores: Scores
    metrics: list[Metric]
    taken: Taken
    evaluation_seconds: float
    device: str
    writes: bool = True

    def describe(self) -> dict[str, Any]:
        """What the training took, for result.json."""
        return {
            "steps": self.taken.steps,
            "epochs": self.taken.epochs,
            "examples_seen": self.taken.examples,
            "tokens_seen": self.taken.tokens,
            "seconds": self.taken.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "device": self.device,
            "threads": torch.get_num_threads(),
        }


def train_model(
    model: transformers.PreTrainedModel,
    task: Task,
    stages: Sequence[TrainingStage],
    held_out: Mapping[str, Selection],
    tokenizer: Any,
    evaluation: EvaluationConfig,
    output: Path,
    save_dtype: torch.dtype = torch.float32,
    seat: Seat | None = None,
    adapters: Adapters | None = None,
) -> Outcome:
    """Train stage after stage, resuming where an earlier session was; save; measure what was saved.

    Args:
        model: the student.
        stages: what it learns; each begins with the weights of the one before.
        held_out: split name -> examples to measure on.
        save_dtype: precision of the weights in the finished folder.
        seat: among students that read their batches together.
        adapters: of the model, merged before it is measured and saved.

    Raises:
        ConfigError: a setting, a name pattern or a split does not exist.
        NumericalError: the loss is not finite.
    """
    task.require_packages()
    planned = [training_arguments(s.training, evaluation, output, s.name) for s in stages]
    rank, world_size = planned[0].process_index, planned[0].world_size
    exam = Exam(task, held_out, evaluation, stages[0].collator, tokenizer, rank, world_size)
    course = _Course(model, exam, output, seat)
    for stage in stages[1:]:
        course.prepare(stage)  # what does not fit is refused before the first step
    with without_cache(model):
        for number, (stage, args) in enumerate(zip(stages, planned, strict=True)):
            course.begin(stage, args.seed + number if number else None)
            course.learn(stage, args, last=number == len(stages) - 1)
    delattr(model, PROJECTIONS)
    writes = planned[0].process_index == 0
    if adapters is not None:
        adapters.merge(output, writes)
    _round_weights(model.eval(), save_dtype)
    scores = exam.final(model)
    if writes:
        task.save(model.to(save_dtype), output)
        tokenizer.save_pretrained(output)
    return Outcome(
        scores=scores,
        metrics=measure(task, scores, evaluation.slices),
        taken=course.taken,
        evaluation_seconds=course.evaluation_seconds,
        device=str(planned[0].device),
        writes=writes,
    )


class _Course:
    """A model on its way through the stages: what it has taken so far, and what may learn."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        exam: Exam,
        output: Path,
        seat: Seat | None,
    ):
        self.taken, self.evaluation_seconds = Taken(), 0.0
        self._model, self._exam, self._output, self._seat = model, exam, output, seat
        self._losses: Sequence[Loss] = ()
        self._learnable = [p for p in model.parameters() if p.requires_grad]

    def prepare(self, stage: TrainingStage) -> None:
        """Freeze what a stage freezes, and nothing else."""
        for parameter in self._learnable:
            parameter.requires_grad_(True)
        stage.freezing.apply(self._model)

    def begin(self, stage: TrainingStage, seed: int | None) -> None:
        """Freeze, and give the model the stage's projections; those it has from before go on."""
        before = getattr(self._model, PROJECTIONS, None)
        if before is not None:
            delattr(self._model, PROJECTIONS)
        self.prepare(stage)
        if seed is not None:  # of new projections; the same after an interruption
            torch.manual_seed(seed)
        attach_projections(self._model, stage.losses, stage.teacher_widths)
        if before is not None:
            carry_projections(before, self._losses, self._model, stage.losses)
        self._losses = stage.losses

    def learn(self, stage: TrainingStage, args: transformers.TrainingArguments, last: bool) -> None:
        """Train a stage, or take over the weights that an earlier session ended it with."""
        folder, found = Path(args.output_dir), read_stage(Path(args.output_dir))
        if found is not None:
            self.taken, weights = found
            self._model.load_state_dict(weights)
            return
        trainer = self._train(stage, args)
        self.evaluation_seconds += trainer.seconds_evaluating
        before, state = self.taken, trainer.state
        epochs = float(state.epoch or 0.0)
        self.taken = Taken(
            steps=before.steps + state.global_step,
            epochs=before.epochs + epochs,
            examples=before.examples + round(epochs * len(stage.train.deal or stage.train)),
            tokens=before.tokens + state.num_input_tokens_seen,
            seconds=trainer.seconds_training,
        )
        if last:
            return
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            save_stage(folder, weights, self.taken)

    def _train(
        self, stage: TrainingStage, args: transformers.TrainingArguments
    ) -> DistillationTrainer:
        resume, evaluation = last_checkpoint(Path(args.output_dir)), self._exam.evaluation
        curve = Curve(
            self._output / "metrics.jsonl", stage.name, self.taken.steps, self.taken.epochs
        )
        seconds = curve.cut(step_of(resume)) if args.process_index == 0 else 0.0
        trainer = DistillationTrainer(
            self._model,
            stage.losses,
            stage.train,
            stage.collator,
            args,
            evaluate_model=self._exam.curve if evaluation.every else None,
            curve=curve,
            seconds_before=max(seconds, self.taken.seconds),
            learning_rates=stage.learning_rates,
            gradual=stage.freezing.gradual,
            seat=self._seat,
            callbacks=[
                *session_guards(self._output, evaluation.early_stopping),
                *_reporters(args, self._output, stage.name),
                *stage.callbacks,
            ],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer


def _reporters(
    args: transformers.TrainingArguments, output: Path, stage: str | None
) -> list[transformers.TrainerCallback]:
    """TensorBoard's files beside the curve: the folder of checkpoints, its default, is removed."""
    if "tensorboard" not in args.report_to or os.getenv("TENSORBOARD_LOGGING_DIR"):
        return []
    args.report_to = [name for name in args.report_to if name != "tensorboard"]
    writer = TensorBoardCallback()
    writer.logging_dir = str(output / "tensorboard" / (stage or ""))
    return [writer]


@torch.no_grad()
def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round parameters as saving will; buffers are made anew when a model is loaded."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
