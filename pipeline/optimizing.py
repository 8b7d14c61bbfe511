"""Learning rates of a student's parts, as parameter groups of its optimizer.

names of parameters -> rate by pattern, projection or depth -> groups of one rate and weight decay
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from transformers import TrainingArguments

from pipeline.config import StrictModel
from pipeline.errors import ConfigError
from pipeline.student.parameters import levels_below_head, match_parameters
from pipeline.terms import PROJECTIONS

Rate = Annotated[float, Field(ge=0.0)]


class LearningRates(StrictModel):
    """Rates that differ from `training.learning_rate`; a schedule scales all of them alike.

    Attributes:
        layer_decay: the rate of each layer over that of the layer above; the head has the full
            rate, the embeddings lie below the first layer. Howard and Ruder 2018; in this form
            Clark et al. 2020 (ELECTRA).
        projections: the rate of the losses' own parameters; as the head's where left out.
        patterns: name pattern -> rate, before all else; the first one that matches counts.
    """

    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    projections: Rate | None = None
    patterns: dict[str, Rate] = {}

    def by_name(self, model: nn.Module, rate: float) -> dict[str, float]:
        """The learning rate of each parameter.

        Args:
            model: the student, its projections attached.
            rate: of the head.

        Raises:
            ConfigError: a pattern matches no parameter (with the nearest name).
            ModelError: layers are to differ, but cannot be told by their names.
        """
        names = [name for name, _ in model.named_parameters()]
        found = dict.fromkeys(names, rate)
        if self.layer_decay != 1.0:
            levels = levels_below_head(model)
            found = {name: rate * self.layer_decay ** levels[name] for name in names}
        projections = [name for name in names if PROJECTIONS in name.split(".")]
        found |= dict.fromkeys(projections, rate if self.projections is None else self.projections)
        for pattern, own in reversed(self.patterns.items()):
            matched = match_parameters(names, pattern, "learning_rates.patterns")
            found |= dict.fromkeys(matched, own)
        return found


def group_settings(
    model: nn.Module,
    rates: LearningRates,
    args: TrainingArguments,
    decayed: Collection[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings of an optimizer with the groups among them, as transformers takes them.

    Raises:
        ConfigError: the optimizer makes groups of its own.
    """
    if {"params", "model", "optimizer_dict"} & set(settings):
        raise ConfigError(
            f"learning_rates: training.optim {args.optim} groups parameters itself; choose another"
            " optimizer or leave them out"
        )
    return {**settings, "params": parameter_groups(model, rates, args, decayed)}


def parameter_groups(
    model: nn.Module, rates: LearningRates, args: TrainingArguments, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """The parameters that learn, in groups of one rate and one weight decay.

    The fastest come first: theirs is the `learning_rate` that transformers logs.

    Args:
        decayed: names of the parameters that `args.weight_decay` pulls on; the others have none.
    """
    by_name = rates.by_name(model, args.learning_rate)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (by_name[name], args.weight_decay if name in decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[rate, decay], "lr": rate, "weight_decay": decay}
        for rate, decay in sorted(groups, reverse=True)
    ]
