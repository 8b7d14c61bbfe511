"""Train one student from a cache: cache -> reading -> student -> trainer -> folder -> result.json.

A student's config names a cache and repeats nothing about it; what does not fit the cache is
refused before the first step.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
from pydantic import Field

from pipeline.accounts import ExampleWeights, Marks
from pipeline.arguments import EvaluationConfig
from pipeline.batches import Collator, Selection
from pipeline.cache import TeacherCache
from pipeline.config import StrictModel, member_of
from pipeline.evaluation import measure, teacher_scores
from pipeline.freezing import Freeze, Freezing
from pipeline.lockstep import Seat
from pipeline.losses import LOSSES
from pipeline.losses.base import Loss
from pipeline.optimizing import LearningRates
from pipeline.reading import Reading, count_layers, load_tokenizer, open_reading
from pipeline.report.card import write_card
from pipeline.resuming import check_run_folder, finish_run
from pipeline.runs import Result
from pipeline.sampling import Sampling
from pipeline.sources import DataConfig
from pipeline.student import (
    FromScratch,
    Origin,
    build_student,
    name_labels,
    own_tokenizer,
)
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Scores
from pipeline.teachers import FurtherTeachers, make_company
from pipeline.terms import attach_projections
from pipeline.training import Outcome, train_model
from stages.naming import name_teacher
from stages.progress import TrainingProgress
from stages.provenance import describe_provenance
from stages.quiet import quiet_libraries


class StudentConfig(StrictModel):
    """One student experiment.

    Attributes:
        cache: the finished cache it learns from.
        output: the run's folder.
        student: where the model comes from.
        inputs: other texts of the cached examples, joined by id; None reads what the teacher read.
        losses: the weighted terms; labels alone are `cross_entropy`.
        further_teachers: other caches of the same example ids.
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

    cache: Path
    output: Path
    student: Origin
    inputs: DataConfig | None = None
    losses: list[Annotated[Loss, *member_of(LOSSES, "loss")]] = Field(min_length=1)
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


@quiet_libraries()
def train_student(config: StudentConfig, seat: Seat | None = None) -> Path:
    """Train the student of a config and return its folder; a finished one is left as it is.

    Args:
        seat: among students that read their batches together.

    Raises:
        StillroomError: the config, cache or checkpoint does not fit (one line).
    """
    reading = read_cache(config)
    manifest = reading.cache.manifest
    if check_run_folder(config.output, config):
        return config.output
    model = build_student(
        config.student, reading.task, manifest.num_classes, reading.tokenizer, config.seed
    )
    losses, collator, widths = listen(config, reading, model)
    name_labels(model, manifest.label_names)
    config.freeze.apply(model)
    parameters = model.num_parameters()
    attach_projections(model, losses, widths)
    train = choose_examples(config, reading)
    collator = replace(collator, marks=_mark_examples(config, reading, train))
    curve_split = config.evaluation.curve_split or config.evaluation.split
    outcome = train_model(
        model,
        reading.task,
        losses,
        train,
        {name: reading.select(name) for name in {curve_split, config.evaluation.split}},
        collator,
        reading.tokenizer,
        {"seed": config.seed, **config.training},
        config.evaluation,
        config.output,
        config.learning_rates,
        config.freeze.gradual,
        callbacks=[TrainingProgress(config.output.name)],
        seat=seat,
    )
    result = Result(
        name=config.output.name,
        kind="student",
        task=reading.task.name,
        config=config.model_dump(mode="json"),
        identity={"cache": manifest.digest},
        model=describe_model(model, parameters, reading.task.auto_class),
        training=describe_training(outcome, len(train.deal or train)),
        metrics=outcome.metrics,
        details=describe_findings(config, reading, train, outcome.scores),
    )
    if outcome.writes:
        write_card(config.output, result)
        finish_run(config.output, result)
    return config.output


def listen(
    config: StudentConfig, reading: Reading, model: transformers.PreTrainedModel
) -> tuple[list[Loss], Collator, dict[str, int]]:
    """The terms of the loss, the collator that brings their knowledge, widths of the signals."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    terms = [loss.name_classes(reading.cache.manifest.label_names) for loss in config.losses]
    section = config.further_teachers
    if section is None:
        losses = [loss.resolve(depth, reading.teacher_layers) for loss in terms]
        collator = reading.collator(losses)
        return losses, collator, reading.widths(collator.signals)
    caches = {name: TeacherCache.open(share.cache) for name, share in section.caches.items()}
    losses = []
    for loss in section.expand(terms):
        cache = reading.cache if loss.teacher is None else caches[loss.teacher]
        losses.append(loss.resolve(depth, count_layers(cache)))
    company = make_company(section, reading, caches, losses)
    collator = reading.collator([loss for loss in losses if loss.teacher is None])
    widths = reading.widths(collator.signals)
    for member in company.members:
        found = member.reading.widths(member.collator.signals)
        widths |= {f"{member.name}/{signal}": width for signal, width in found.items()}
    return losses, replace(collator, company=company), widths


def read_cache(config: StudentConfig) -> Reading:
    """Open the cache of a config as its student reads it."""
    tokenizer = own_tokenizer(config.student)
    student = config.student
    name = student.architecture if isinstance(student, FromScratch) else student.model
    reading = open_reading(TeacherCache.open(config.cache), tokenizer, config.inputs, name)
    return replace(reading, task=reading.task.measured(config.evaluation.task))


def choose_examples(config: StudentConfig, reading: Reading) -> Selection:
    """What the student learns from, and how often an epoch shows it."""
    train = reading.select("train")
    if reading.own_rows is not None and all(loss.unit == "labels" for loss in config.losses):
        rows = reading.own_rows  # a row without a label teaches such a student nothing
        labelled = [i for i in train.indices if (rows[i].label_ids != UNLABELLED).any()]
        train.indices = train.indices[np.isin(train.indices, labelled)]
    if config.max_examples is not None:
        train.indices = train.indices[: config.max_examples]
    if config.sampling is not None:
        train.deal = config.sampling.deal(reading.group(train, config.sampling.by))
    return train


def _mark_examples(config: StudentConfig, reading: Reading, train: Selection) -> Marks | None:
    """What training batches tell of their examples, None where nobody asks."""
    weights = config.example_weights
    if weights is None and not config.log_slices:
        return None
    if weights is not None:
        weights.check(list(reading.group(train, weights.by)))
    slices = {
        column: [name for name, rows in reading.group(train, column).items() if len(rows)]
        for column in config.log_slices
    }
    return Marks(weights, slices)


def describe_findings(
    config: StudentConfig, reading: Reading, train: Selection, scores: Scores
) -> dict[str, Any]:
    """What a report and a card tell of a student beside its metrics; JSON values only."""
    section, split = config.further_teachers, config.evaluation.split
    further = [] if section is None else [share.cache for share in section.caches.values()]
    return {
        **reading.task.details(scores),
        "teacher": _describe_teacher(reading, config.evaluation),
        "training_rows": _count_rows(config, reading, train),
        "provenance": describe_provenance(
            reading, train, split, config.student, config.inputs, further
        ),
    }


def _count_rows(
    config: StudentConfig, reading: Reading, train: Selection
) -> dict[str, dict[str, dict[str, int]]]:
    """How much there was to learn from of each language or other slice, where that is known."""
    found = {}
    if reading.own_rows is not None:
        carried = reading.own_rows[0].columns
        for column in (name for name in config.evaluation.slices if name in carried):
            groups = reading.group(train, column)
            found[column] = {name: {"rows": len(rows)} for name, rows in groups.items()}
    if config.sampling is not None and train.deal is not None:
        found[config.sampling.by] = train.deal.describe()
    return found


def describe_training(outcome: Outcome, examples: int) -> dict[str, Any]:
    """What the training took, for result.json; `examples` is what an epoch has of them."""
    return {
        "steps": outcome.steps,
        "epochs": outcome.epochs,
        "examples_seen": round(outcome.epochs * examples),
        "tokens_seen": outcome.tokens,
        "seconds": outcome.seconds,
        "evaluation_seconds": outcome.evaluation_seconds,
        "device": outcome.device,
        "threads": torch.get_num_threads(),
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
        "parameters": teacher["parameters"],
        "metrics": [vars(metric) for metric in measure(reading.task, scores, slices)],
        **reading.task.details(scores),
    }
