"""The stages of one training: what each learns from, of what, how fast and for how long.

config (top + stages) -> StageConfig with nothing left out -> TrainingStage -> train_model
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Annotated, Any

from pydantic import Field, model_validator
from transformers import TrainerCallback, TrainingArguments

from pipeline.batches import Collator, Selection, StepSampler
from pipeline.config import StrictModel, member_of
from pipeline.errors import ConfigError
from pipeline.freezing import Freeze, Freezing
from pipeline.losses import LOSSES
from pipeline.losses.base import Loss
from pipeline.optimizing import LearningRates

AnyLoss = Annotated[Loss, *member_of(LOSSES, "loss")]
_LENGTHS = ("max_steps", "num_train_epochs")


class StageConfig(StrictModel):
    """One stage; it begins with the weights of the one before, its optimizer and schedule new.

    What is left out is as at the top of the config; `training` is merged over the one there. Its
    length is said by one of `until`, `steps` and its own training.max_steps or num_train_epochs.

    Attributes:
        name: in the curve; its number, from 1, where left out.
        losses, training, learning_rates, freeze: as at the top of the config.
        until: the share of all steps, those that `training` at the top asks for, at which it ends;
            the last stage takes the rest.
        steps: how many optimizer steps it takes.
    """

    name: str | None = Field(default=None, min_length=1, pattern=r"^\w[\w.-]*$")
    losses: list[AnyLoss] | None = Field(default=None, min_length=1)
    training: dict[str, Any] = {}
    learning_rates: LearningRates | None = None
    freeze: Freeze | None = None
    until: float | None = Field(default=None, gt=0.0, lt=1.0)
    steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        own = [f"training.{name}" for name in _LENGTHS if name in self.training]
        told = [name for name in ("until", "steps") if getattr(self, name) is not None]
        if len(told) + bool(own) > 1:
            raise ConfigError(f"its length is told by {' and '.join(told + own)}; choose one")
        return self


@dataclass(frozen=True)
class TrainingStage:
    """A stage as it is trained.

    Attributes:
        losses: the terms.
        train: examples to learn from.
        collator: joins them into batches.
        training: names and values of transformers.TrainingArguments.
        teacher_widths: signal -> D of the teacher, for the losses' projections.
        learning_rates: of parts of the model that do not learn at `training.learning_rate`.
        freezing: what does not learn, or not yet.
        name: in the curve and the folders; None where it is the only one.
        callbacks: of transformers, for instance to show progress.
    """

    losses: Sequence[Loss]
    train: Selection
    collator: Collator
    training: Mapping[str, Any]
    teacher_widths: Mapping[str, int] = field(default_factory=dict)
    learning_rates: LearningRates | None = None
    freezing: Freezing = field(default_factory=Freezing)
    name: str | None = None
    callbacks: Sequence[TrainerCallback] = ()


def require_stages(top: StageConfig, stages: Sequence[StageConfig] | None) -> None:
    """Refuse stages that do not make up one training.

    Raises:
        ConfigError: a stage without losses, two of one name, or ends that do not rise.
    """
    if stages is None:
        if top.losses is None:
            raise ConfigError("losses is missing; add it")
        return
    names = [stage.name for stage in merge_stages(top, stages)]
    ends = [stage.until for stage in stages]
    for number, (stage, name) in enumerate(zip(stages, names, strict=True)):
        if stage.losses is None and top.losses is None:
            raise ConfigError(f"stages.{number}.losses is missing; add it")
        if name in names[:number]:
            raise ConfigError(f"stages.{number}.name: {name!r} is the name of another stage too")
    if any(ends):
        told = [end for end in ends[:-1] if end is not None]
        if ends[-1] is not None or len(told) < len(ends) - 1 or told != sorted(set(told)):
            raise ConfigError(
                f"stages: end at {', '.join(str(e) for e in ends)} of the steps; give each but the"
                " last an until, later than that of the stage before"
            )


def merge_stages(top: StageConfig, stages: Sequence[StageConfig] | None) -> list[StageConfig]:
    """The stages with what they leave out taken from the top; the top alone where there are none.

    A stage with a length of its own does not take over the top's.
    """
    if stages is None:
        return [top]
    merged = []
    for number, stage in enumerate(stages, 1):
        told = stage.steps is not None or stage.until is not None
        told |= any(name in stage.training for name in _LENGTHS)
        kept = {k: v for k, v in top.training.items() if not (told and k in _LENGTHS)}
        changes = {
            "name": stage.name or str(number),
            "losses": stage.losses or top.losses,
            "training": {**kept, **stage.training},
            "learning_rates": stage.learning_rates or top.learning_rates,
            "freeze": top.freeze if stage.freeze is None else stage.freeze,
        }
        merged.append(stage.model_copy(update=changes))
    return merged


def tell_lengths(stages: Sequence[StageConfig], total: int) -> list[StageConfig]:
    """The same stages with the number of their steps in `training.max_steps`, where it is told.

    Args:
        total: the steps that `training` at the top asks for.

    Raises:
        ConfigError: a stage would have no step.
    """
    begin, told = 0, []
    shared = any(stage.until is not None for stage in stages)
    for stage in stages:
        steps = stage.steps
        if shared:
            end = total if stage.until is None else round(stage.until * total)
            begin, steps = end, end - begin
            if steps < 1:
                raise ConfigError(
                    f"stages: {stage.name} ends at step {end} of {total}, where it begins; train"
                    " longer, or choose another until"
                )
        length = {} if steps is None else {"max_steps": steps}
        told.append(stage.model_copy(update={"training": {**stage.training, **length}}))
    return told


def count_steps(args: TrainingArguments, train: Selection) -> int:
    """The optimizer steps of a training."""
    if args.max_steps > 0:
        return int(args.max_steps)
    sampler = StepSampler(
        train.deal or len(train),
        args.train_batch_size,
        args.seed,
        args.process_index,
        args.world_size,
        args.dataloader_drop_last,
    )
    each = max(1, ceil(len(sampler) / args.gradient_accumulation_steps))
    steps: int = ceil(args.num_train_epochs * each)
    return steps
