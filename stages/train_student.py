"""Train one student from a cache: cache -> reading -> student -> trainer -> folder -> result.json.

A student's config names a cache and repeats nothing about it; what does not fit the cache is
refused before the first step.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from pydantic import Field, model_validator

from pipeline.accounts import ExampleWeights
from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.batches import Selection
from pipeline.beginning import Place, begin_run
from pipeline.cache import TeacherCache
from pipeline.config import StrictModel
from pipeline.evaluation import measure, teacher_scores
from pipeline.freezing import Freeze, Freezing
from pipeline.joining import load_tokenizer
from pipeline.lineage import describe_lineage
from pipeline.lockstep import Seat
from pipeline.optimizing import LearningRates
from pipeline.reading import Reading, open_reading
from pipeline.report.card import write_card
from pipeline.resuming import finish_run
from pipeline.runs import Result
from pipeline.sampling import Sampling
from pipeline.scores import Scores
from pipeline.sources import DataConfig
from pipeline.staging import (
    AnyLoss,
    StageConfig,
    merge_stages,
    require_stages,
)
from pipeline.storage import Folder, Location
from pipeline.student import (
    FromScratch,
    Origin,
    add_adapters,
    build_student,
    name_labels,
    own_tokenizer,
)
from pipeline.teachers import FurtherTeachers
from pipeline.training import train_model
from stages.disk import name_checkpoint, tells_of_disk
from stages.naming import name_teacher
from stages.progress import tell_line
from stages.provenance import describe_provenance
from stages.quiet import quiet_libraries
from stages.student_stages import count_rows, plan_stages


class StudentConfig(StrictModel):
    """One student experiment.

    Attributes:
        cache: the finished cache it learns from.
        output: the run's folder.
        student: where the model comes from.
        inputs: other texts of the cached examples, joined by id; None reads what the teacher read.
        losses: the weighted terms; labels alone are `cross_entropy`.
        further_teachers: other caches of the same example ids.
        stages: trained one after the other; what they leave out is as beside them. Left out, the
            training is one stage.
        sampling: how often an epoch shows the examples of each language; each once where left out.
        example_weights: how much the examples of each language count; alike where left out.
        log_slices: columns for each of whose values the curve has every term of the loss.
        max_examples: learn from the first so many examples of the split `train` only.
        freeze: what stays as it is: name patterns of parameters, or a `Freezing`.
        training: transformers.TrainingArguments, by their own names.
        learning_rates: of parts of the model that do not learn at `training.learning_rate`.
        evaluation: what is measured, and how often.
        seed: of the weights, the order and dropout.
    """

    cache: Location
    output: Folder
    student: Origin
    inputs: DataConfig | None = None
    losses: list[AnyLoss] | None = Field(default=None, min_length=1)
    stages: list[StageConfig] | None = Field(default=None, min_length=1)
    further_teachers: FurtherTeachers | None = None
    sampling: Sampling | None = None
    example_weights: ExampleWeights | None = None
    log_slices: list[str] = []
    max_examples: int | None = Field(default=None, ge=1)
    freeze: Freeze = Freezing()
    training: dict[str, Any] = {}
    learning_rates: LearningRates | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _check_stages(self) -> "StudentConfig":
        require_stages(self._top, self.stages)
        return self

    @property
    def _top(self) -> StageConfig:
        return StageConfig(
            losses=self.losses,
            training={"seed": self.seed, **self.training},
            learning_rates=self.learning_rates,
            freeze=self.freeze,
        )

    @property
    def all_stages(self) -> list[StageConfig]:
        """The stages with nothing left out; one where the config has none."""
        return merge_stages(self._top, self.stages)


@quiet_libraries()
@tells_of_disk(lambda config, seat=None: (config.output, name_checkpoint(config.output)))
def train_student(config: StudentConfig, seat: Seat | None = None) -> Path:
    """Train the student of a config and return its folder; a finished one is left as it is.

    Args:
        seat: among students that read their batches together.

    Raises:
        StillroomError: the config, cache or checkpoint does not fit, or another process trains in
            that folder (one line).
    """
    reading = read_cache(config)
    lineage = describe_lineage(reading, config.further_teachers)
    first = config.all_stages[0]
    plan = partial(training_arguments, first.training, config.evaluation, config.output, first.name)
    with begin_run(config.output, config, "train-student", plan, lineage, tell=tell_line) as place:
        if place is not None:
            _train(config, reading, lineage, place, seat)
    return config.output


def _train(
    config: StudentConfig,
    reading: Reading,
    lineage: Mapping[str, str],
    place: Place,
    seat: Seat | None,
) -> None:
    """Train what is not finished, and write its result."""
    model = build_student(
        config.student, reading.task, reading.num_classes, reading.tokenizer, config.seed
    )
    name_labels(model, reading.cache.manifest.label_names)
    parameters = model.num_parameters()
    adapters = add_adapters(config.student, model, reading.task)
    stages = plan_stages(config, reading, model)
    train = stages[-1].train
    outcome = train_model(
        model,
        reading.task,
        [replace(stage, callbacks=[*stage.callbacks, place]) for stage in stages],
        {name: reading.select(name) for name in config.evaluation.splits},
        reading.tokenizer,
        config.evaluation,
        config.output,
        seat=seat,
        adapters=adapters,
    )
    result = Result(
        name=config.output.name,
        kind="student",
        task=reading.task.name,
        config=config.model_dump(mode="json"),
        identity=lineage,
        model=describe_model(model, parameters, reading.task.auto_class),
        training=outcome.describe(),
        metrics=outcome.metrics,
        details=describe_findings(config, reading, train, outcome.scores),
    )
    if outcome.writes:
        place.require()
        write_card(config.output, result)
        finish_run(config.output, result)


def read_cache(config: StudentConfig) -> Reading:
    """Open the cache of a config as its student reads it."""
    tokenizer = own_tokenizer(config.student)
    student = config.student
    name = student.architecture if isinstance(student, FromScratch) else student.model
    losses = [loss for stage in config.all_stages for loss in stage.losses or []]
    crosses = all(loss.crosses_tokenizers for loss in losses)
    cache = TeacherCache.open(config.cache)
    reading = open_reading(cache, tokenizer, config.inputs, name, crosses)
    return replace(reading, task=reading.task.measured(config.evaluation.task))


def describe_findings(
    config: StudentConfig, reading: Reading, train: Selection, scores: Scores
) -> dict[str, Any]:
    """What a report and a card tell of a student beside its metrics; JSON values only."""
    section, split = config.further_teachers, config.evaluation.split
    further = [] if section is None else [share.cache for share in section.caches.values()]
    return {
        **reading.task.details(scores),
        "teacher": _describe_teacher(reading, config.evaluation),
        "training_rows": count_rows(config, reading, train),
        "provenance": describe_provenance(
            reading, train, split, config.student, config.inputs, further
        ),
    }


def describe_model(
    model: transformers.PreTrainedModel, parameters: int, auto_class: str
) -> dict[str, Any]:
    config = model.config
    return {
        "auto_class": auto_class,
        "architecture": config.model_type,
        "parameters": parameters,
        "layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
    }


def _describe_teacher(reading: Reading, evaluation: EvaluationConfig) -> dict[str, Any]:
    """The teacher on the same held-out examples and slices, as far as its cache tells them."""
    cache = reading.cache
    held_out = Reading(cache, reading.task, reading.tokenizer, None).select(evaluation.split)
    scores = teacher_scores(held_out, reading.task, load_tokenizer(cache))
    slices = [column for column in evaluation.slices if column in scores.columns]
    teacher = cache.manifest.identity.teacher
    return {
        "name": name_teacher(cache) or teacher["architecture"],
        "architecture": teacher["architecture"],
        "parameters": teacher.get("parameters"),  # nobody knows of an imported cache
        "metrics": []  # per token of its own, which nothing of the student compares with
        if reading.crosses
        else [vars(metric) for metric in measure(reading.task, scores, slices)],
        **reading.task.details(scores),
    }
