"""The stages of a student's config as they are trained: what each learns, from which examples.

config, cache, model -> losses that fit them, a collator, examples, a length -> TrainingStage
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import transformers

from pipeline.accounts import Marks
from pipeline.arguments import training_arguments
from pipeline.attention import model_depth
from pipeline.batches import Collator, Selection
from pipeline.cache import TeacherCache
from pipeline.crossing import CROSSED, Crossing
from pipeline.errors import ConfigError, StillroomError
from pipeline.freezing import Freezing
from pipeline.losses.base import Loss
from pipeline.reading import Reading, count_layers
from pipeline.staging import TrainingStage, count_steps, tell_lengths
from pipeline.targets import UNLABELLED
from pipeline.teachers import make_company
from stages.progress import TrainingProgress

if TYPE_CHECKING:
    from stages.train_student import StudentConfig


def plan_stages(
    config: "StudentConfig", reading: Reading, model: transformers.PreTrainedModel
) -> list[TrainingStage]:
    """The stages of a config with their examples, losses and lengths.

    Raises:
        StillroomError: a loss, a length or the examples do not fit the cache.
    """
    stages = config.all_stages
    heard = [listen(config, stage.losses or [], reading, model) for stage in stages]
    examples = [choose_examples(config, reading, losses) for losses, _, _ in heard]
    training = {"seed": config.seed, **config.training}
    args = training_arguments(training, config.evaluation, config.output)
    stages = tell_lengths(stages, max(count_steps(args, chosen) for chosen in examples))
    return [
        TrainingStage(
            losses=losses,
            train=train,
            collator=replace(collator, marks=_mark_examples(config, reading, train)),
            training=stage.training,
            teacher_widths=widths,
            learning_rates=stage.learning_rates,
            freezing=stage.freeze or Freezing(),
            name=stage.name,
            callbacks=[TrainingProgress(" ".join(filter(None, (config.output.name, stage.name))))],
        )
        for stage, (losses, collator, widths), train in zip(stages, heard, examples, strict=True)
    ]


def listen(
    config: "StudentConfig",
    wanted: Sequence[Loss],
    reading: Reading,
    model: transformers.PreTrainedModel,
) -> tuple[list[Loss], Collator, dict[str, int]]:
    """The terms of the loss, the collator that brings their knowledge, widths of the signals.

    Args:
        wanted: the terms as they are configured.
    """
    depth = model_depth(model.config.get_text_config())
    terms = [loss.name_classes(reading.cache.manifest.label_names) for loss in wanted]
    section = config.further_teachers
    if reading.crosses:
        return _cross(terms, section is None, depth, reading)
    if section is None:
        losses = [_introduce(loss, depth, reading.cache) for loss in terms]
        collator = reading.collator(losses)
        return losses, collator, reading.widths(collator.signals)
    caches = section.open()
    losses = []
    for loss in section.expand(terms):
        cache = reading.cache if loss.teacher is None else caches[loss.teacher]
        losses.append(_introduce(loss, depth, cache))
    company = make_company(section, reading, caches, losses)
    collator = reading.collator([loss for loss in losses if loss.teacher is None])
    widths = reading.widths(collator.signals)
    for member in company.members:
        found = member.reading.widths(member.collator.signals)
        widths |= {f"{member.name}/{signal}": width for signal, width in found.items()}
    return losses, replace(collator, company=company), widths


def _cross(
    terms: Sequence[Loss], alone: bool, depth: int, reading: Reading
) -> tuple[list[Loss], Collator, dict[str, int]]:
    """What a student with another tokenizer hears: the teacher as a further one, by `Crossing`."""
    if not alone:
        raise ConfigError(
            "further_teachers: need a student with the tokenizer of the cache; leave them out"
        )
    heard = [
        loss.model_copy(update={"teacher": CROSSED}) if loss.reads_teacher else loss
        for loss in (_introduce(loss, depth, reading.cache) for loss in terms)
    ]
    crossing = Crossing(reading.cache, reading.tokenizer)
    return heard, replace(reading.collator([]), company=crossing), {}


def _introduce(loss: Loss, depth: int, cache: TeacherCache) -> Loss:
    """A loss that knows how many layers student and teacher have, and the teacher's head."""
    known = loss.resolve(depth, count_layers(cache))
    return known.hear(cache.read_head)


def choose_examples(config: "StudentConfig", reading: Reading, losses: Sequence[Loss]) -> Selection:
    """What the student learns from, and how often an epoch shows it."""
    further = config.further_teachers.open() if config.further_teachers is not None else {}
    train = reading.select("train", {name for cache in further.values() for name in cache.skipped})
    if reading.own_rows is not None and all(loss.unit == "labels" for loss in losses):
        rows = reading.own_rows  # a row without a label teaches such a student nothing
        labelled = [i for i in train.indices if (rows[i].label_ids != UNLABELLED).any()]
        train.indices = train.indices[np.isin(train.indices, labelled)]
    if config.max_examples is not None:
        train.indices = train.indices[: config.max_examples]
    if config.sampling is not None:
        train.deal = config.sampling.deal(reading.group(train, config.sampling.by))
    return train


def _mark_examples(config: "StudentConfig", reading: Reading, train: Selection) -> Marks | None:
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


def count_rows(
    config: "StudentConfig", reading: Reading, train: Selection
) -> dict[str, dict[str, dict[str, int]]]:
    """How much there was to learn from of each language or other slice, where that is known."""
    found = {}
    for column in config.evaluation.slices:
        with suppress(StillroomError):  # not carried by what was learned from, or no few values
            groups = reading.group(train, column)
            found[column] = {name: {"rows": len(rows)} for name, rows in groups.items()}
    if config.sampling is not None and train.deal is not None:
        found[config.sampling.by] = train.deal.describe()
    return found
