"""Train one student on several tasks: an encoder that they share, a head and a cache for each.

config -> a student's config per task -> lessons -> one trainer -> <output>/<task>, a run each
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from transformers import TrainingArguments

from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.beginning import Place, begin_run
from pipeline.config import StrictModel, dump_config, member_of
from pipeline.curve import Curve
from pipeline.errors import ConfigError, MismatchError
from pipeline.evaluation import measure
from pipeline.exam import Exam
from pipeline.identity import digest_tokenizer
from pipeline.lessons import Lesson, LessonsTrainer, share_encoder
from pipeline.lineage import describe_lineage
from pipeline.locking.locks import LOCKS
from pipeline.losses import LOSSES
from pipeline.losses.base import Loss
from pipeline.optimizing import LearningRates
from pipeline.reading import Reading
from pipeline.report.card import write_card
from pipeline.resuming import (
    check_run_folder,
    finish_run,
    last_checkpoint,
    remove_leftovers,
    session_guards,
    step_of,
)
from pipeline.runs import RESULT, Result
from pipeline.sampling import Sampling
from pipeline.sources import DataConfig
from pipeline.storage import Folder, Location
from pipeline.student import Origin, build_student, name_labels
from pipeline.teachers import FurtherTeachers
from pipeline.terms import PROJECTIONS, attach_projections
from stages.disk import name_checkpoint, tells_of_disk
from stages.progress import TrainingProgress, tell_line
from stages.quiet import quiet_libraries
from stages.student_stages import choose_examples, listen
from stages.train_student import (
    StudentConfig,
    describe_findings,
    describe_model,
    read_cache,
)


class TaskConfig(StrictModel):
    """One task of the student; all but `share` is as in a `StudentConfig`.

    Attributes:
        share: how often a batch is of this task, relative to the others.
    """

    cache: Location
    inputs: DataConfig | None = None
    losses: list[Annotated[Loss, *member_of(LOSSES, "loss")]] = Field(min_length=1)
    further_teachers: FurtherTeachers | None = None
    sampling: Sampling | None = None
    max_examples: int | None = Field(default=None, ge=1)
    share: float = Field(default=1.0, gt=0.0)


class TasksConfig(StrictModel):
    """One student of several tasks.

    Attributes:
        output: the folder; the finished student of each task is in <output>/<its name>.
        student: where the encoder comes from; each task adds its own head.
        tasks: by name.
        training, learning_rates, evaluation, seed: as for a student; `evaluation.early_stopping`
            names a metric as <task>.<metric>.
    """

    output: Folder
    student: Origin
    tasks: dict[str, TaskConfig] = Field(min_length=2)
    training: dict[str, Any] = {}
    learning_rates: LearningRates | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.tasks:
            taken = name in ("checkpoints", LOCKS)
            if taken or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"tasks: {name!r} is no name of a folder; use letters and digits")
        return self

    def students(self) -> dict[str, StudentConfig]:
        """Each task as a run of its own."""
        shared = {
            name: getattr(self, name)
            for name in ("student", "training", "learning_rates", "evaluation", "seed")
        }
        return {
            name: StudentConfig.model_validate(
                {
                    **{k: v for k, v in vars(task).items() if k != "share"},
                    **shared,
                    "output": self.output / name,
                }
            )
            for name, task in self.tasks.items()
        }


@quiet_libraries()
@tells_of_disk(lambda config: (config.output, name_checkpoint(config.output)))
def train_tasks(config: TasksConfig) -> list[Path]:
    """Train the student of a config and return the folders of its tasks.

    Raises:
        ConfigError: the tasks' encoders differ, or there are several processes.
        MismatchError: the caches' tokenizers differ.
        StillroomError: as `train_student`.
    """
    configs = config.students()
    folders = [one.output for one in configs.values()]
    readings = {name: read_cache(one) for name, one in configs.items()}
    lineages = {
        name: describe_lineage(reading, configs[name].further_teachers)
        for name, reading in readings.items()
    }
    told = {f"{name}.{k}": v for name, known in lineages.items() for k, v in known.items()}
    plan, tasks = partial(_plan, config), config.tasks
    with begin_run(config.output, config, "train-tasks", plan, told, tasks, tell_line) as place:
        for name, lineage in lineages.items():
            if (configs[name].output / RESULT).is_file():
                check_run_folder(configs[name].output, configs[name], lineage)
        if place is not None:
            _require_one_tokenizer(readings)
            lessons = _make_lessons(config, configs, readings)
            took = _train(config, lessons, place)
            place.require()
            for lesson in lessons:
                delattr(lesson.model, PROJECTIONS)
                name = lesson.name
                if not (configs[name].output / RESULT).is_file():  # else a reader may be at it
                    _finish(configs[name], readings[name], lineages[name], lesson, took)
            remove_leftovers(config.output)
    return folders


def _plan(config: TasksConfig) -> TrainingArguments:
    settings = {"seed": config.seed, **config.training}
    return training_arguments(settings, config.evaluation, config.output)


def _require_one_tokenizer(readings: dict[str, Reading]) -> None:
    digests = {name: digest_tokenizer(reading.tokenizer) for name, reading in readings.items()}
    first, *others = digests
    for name in others:
        if digests[name] != digests[first]:
            raise MismatchError(
                f"tasks.{name}: reads with tokenizer {digests[name][:8]}…, {first} with"
                f" {digests[first][:8]}…; one encoder needs one tokenizer: choose a student that"
                " brings its own, or cache both teachers with the same"
            )


def _make_lessons(
    config: TasksConfig, configs: dict[str, StudentConfig], readings: dict[str, Reading]
) -> list[Lesson]:
    if getattr(config.student, "lora", None) is not None:
        raise ConfigError("student.lora: adapts students of one task; leave it out for several")
    models = {}
    for name, reading in readings.items():
        models[name] = build_student(
            config.student, reading.task, reading.num_classes, reading.tokenizer, config.seed
        )
        name_labels(models[name], reading.cache.manifest.label_names)
    share_encoder(list(models.values()))
    lessons = []
    for name, reading in readings.items():
        losses, collator, widths = listen(
            configs[name], config.tasks[name].losses, reading, models[name]
        )
        attach_projections(models[name], losses, widths)
        lessons.append(
            Lesson(
                name=name,
                model=models[name],
                losses=losses,
                train=choose_examples(configs[name], reading, losses),
                exam=Exam(
                    reading.task,
                    {split: reading.select(split) for split in config.evaluation.splits},
                    config.evaluation,
                    collator,
                    reading.tokenizer,
                ),
                collator=collator,
                weight=config.tasks[name].share,
            )
        )
    return lessons


def _train(config: TasksConfig, lessons: list[Lesson], place: Place) -> dict[str, Any]:
    """Train all lessons and say what it took."""
    evaluation, output = config.evaluation, config.output
    args = _plan(config)
    resume, curve = last_checkpoint(output / "checkpoints"), Curve(output / "metrics.jsonl")
    seconds = curve.cut(step_of(resume))

    def measure_curve(_: Any) -> list[Any]:
        return [metric for lesson in lessons for metric in lesson.curve()]

    trainer = LessonsTrainer(
        lessons,
        args,
        measure_curve if evaluation.every else None,
        curve,
        seconds,
        config.learning_rates,
        [
            *session_guards(output, evaluation.early_stopping),
            TrainingProgress(output.name),
            place,
        ],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.model.eval()
    return {
        "steps": trainer.state.global_step,
        "epochs": float(trainer.state.epoch or 0.0),
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "seconds": trainer.seconds_training,
        "evaluation_seconds": trainer.seconds_evaluating,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
    }


def _finish(
    config: StudentConfig,
    reading: Reading,
    lineage: dict[str, str],
    lesson: Lesson,
    took: dict[str, Any],
) -> None:
    """Measure a task's student and write its folder, as if it had been trained alone."""
    evaluation, task = config.evaluation, reading.task
    scores = lesson.exam.final(lesson.model)
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    lesson.collator.task.save(lesson.model, folder)
    reading.tokenizer.save_pretrained(folder)
    result = Result(
        name=folder.name,
        kind="student",
        task=task.name,
        config=config.model_dump(mode="json"),
        identity=lineage,
        model=describe_model(lesson.model, lesson.model.num_parameters(), task.auto_class),
        training=took,
        metrics=measure(task, scores, evaluation.slices),
        details=describe_findings(config, reading, lesson.train, scores),
    )
    write_card(folder, result)
    finish_run(folder, result)
