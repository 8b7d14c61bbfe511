"""Train or fine-tune a teacher from labels: rows -> tokenizer -> examples -> model -> folder.

A teacher is trained as a student is, with cross-entropy alone; the folder it leaves can be named as
the teacher of a cache, and its result.json says how good it is.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import Field

from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.batches import Collator, Selection
from pipeline.beginning import Place, begin_run
from pipeline.config import StrictModel, member_of
from pipeline.errors import DataError, ModelError
from pipeline.examples import Example
from pipeline.freezing import Freeze, Freezing
from pipeline.losses.base import Loss
from pipeline.losses.labels import CrossEntropy
from pipeline.losses.numbers import LabelMSE
from pipeline.resuming import finish_run
from pipeline.runs import Result
from pipeline.safe_loading import NO_CODE
from pipeline.sources import DataConfig, Rows, load_rows
from pipeline.staging import TrainingStage
from pipeline.storage import Folder
from pipeline.student import FromScratch, Origin, add_adapters, build_student, name_labels
from pipeline.targets import UNLABELLED
from pipeline.tasks import TASKS, Task
from pipeline.training import train_model
from stages.disk import name_checkpoint, tells_of_disk
from stages.progress import TrainingProgress, tell_line
from stages.quiet import quiet_libraries

_READ = (
    "text",
    "text_pair",
    "prompt",
    "completion",
    "source",
    "target",
    "tokens",
    "question",
    "context",
)


class NewTokenizer(StrictModel):
    """A byte-level BPE made from the training text; one special token begins and ends documents,
    another one hides tokens where the task is masked-lm."""

    vocab_size: int = Field(ge=257)


class TrainTeacherConfig(StrictModel):
    """The recipe of a teacher.

    Attributes:
        output: the folder to write.
        task, data: what it learns and from which rows; splits `train` and the one evaluated.
        model: a new architecture or a pretrained checkpoint.
        tokenizer: how to make one; None takes the pretrained checkpoint's own.
        label_smoothing, class_weights: of the cross-entropy, as for a student.
        freeze, training, evaluation: as for a student.
        dtype: precision of the saved weights.
        seed: of the weights, the order and dropout.
    """

    output: Folder
    task: Annotated[Task, *member_of(TASKS, "task")]
    data: DataConfig
    model: Origin
    tokenizer: NewTokenizer | None = None
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    class_weights: dict[int | str, Annotated[float, Field(ge=0.0)]] = {}
    freeze: Freeze = Freezing()
    training: dict[str, Any] = {}
    evaluation: EvaluationConfig = EvaluationConfig()
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: int = 0


@quiet_libraries()
@tells_of_disk(lambda config: (config.output, name_checkpoint(config.output)))
def train_teacher(config: TrainTeacherConfig) -> Path:
    """Train the teacher of a config and return its folder; a finished one is left as it is.

    Raises:
        StillroomError: the config, data or checkpoint does not fit, or another process trains in
            that folder (one line).
    """
    output = config.output
    settings = {"seed": config.seed, **config.training}
    plan = partial(training_arguments, settings, config.evaluation, output)
    with begin_run(output, config, "train-teacher", plan, tell=tell_line) as place:
        if place is not None:
            _train(config, place)
    return output


def _train(config: TrainTeacherConfig, place: Place) -> None:
    """Train what is not finished, and write its result."""
    output = config.output
    rows = load_rows(config.data)
    task = config.task
    if hasattr(task, "labels"):
        task = task.model_copy(update={"labels": rows.label_names})
    tokenizer = _tokenizer(config, rows)
    model = build_student(config.model, task, task.num_classes(tokenizer), tokenizer, config.seed)
    task = task.complete(model.config, tokenizer)
    examples = list(task.examples(rows, tokenizer, config.data.carry))
    name_labels(model, task.label_names)
    loss = _loss(config, task)
    parameters = model.num_parameters()
    adapters = add_adapters(config.model, model, task)
    stage = TrainingStage(
        losses=[loss],
        train=Selection(examples, _split(examples, "train")),
        collator=Collator(task, tokenizer.pad_token_id or 0),
        training={"seed": config.seed, **config.training},
        freezing=config.freeze,
        callbacks=[TrainingProgress(output.name), place],
    )
    outcome = train_model(
        model,
        task,
        [stage],
        {name: Selection(examples, _split(examples, name)) for name in config.data.splits},
        tokenizer,
        config.evaluation,
        output,
        getattr(torch, config.dtype),
        adapters=adapters,
    )
    result = Result(
        name=output.name,
        kind="teacher",
        task=task.name,
        config=config.model_dump(mode="json"),
        identity={"data": rows.digest},
        model={"architecture": model.config.model_type, "parameters": parameters},
        training=outcome.describe(),
        metrics=outcome.metrics,
        details=task.details(outcome.scores),
    )
    if outcome.writes:
        place.require()
        finish_run(output, result)


def _loss(config: TrainTeacherConfig, task: Task) -> Loss:
    if task.numeric:
        return LabelMSE()
    loss = CrossEntropy(label_smoothing=config.label_smoothing, class_weights=config.class_weights)
    return loss.name_classes(task.label_names)


def _tokenizer(config: TrainTeacherConfig, rows: Rows) -> Any:
    if config.tokenizer is not None:
        return _train_tokenizer(config.tokenizer, rows, masks=config.task.name == "masked-lm")
    if isinstance(config.model, FromScratch):
        return transformers.AutoTokenizer.from_pretrained(config.model.architecture, **NO_CODE)
    try:
        return transformers.AutoTokenizer.from_pretrained(config.model.model, **NO_CODE)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{config.model.model}: has no tokenizer ({first})") from error


def _train_tokenizer(wanted: NewTokenizer, rows: Rows, masks: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end, mask = "<|endoftext|>", "<|mask|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted.vocab_size,
        special_tokens=[end, mask] if masks else [end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_text(rows), trainer)
    named = {"bos_token": end, "eos_token": end, "pad_token": end}
    if masks:
        named["mask_token"] = mask
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


def _training_text(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["split"] == "train":
            given = [row[column] for column in _READ if row.get(column) is not None]
            yield from (cell if isinstance(cell, str) else " ".join(cell) for cell in given)


def _split(examples: list[Example], name: str) -> list[int]:
    found = [
        index
        for index, example in enumerate(examples)
        if example.columns.get("split") == name and (example.label_ids != UNLABELLED).any()
    ]
    if not found:
        raise DataError(f"data: no example with a label is in split {name!r}; see data.splits")
    return found
