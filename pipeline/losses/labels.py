"""Learning from one class per position: its label, or what the teacher would choose."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError, did_you_mean
from pipeline.losses.base import Knowledge, Unit
from pipeline.losses.classes import ClassLoss, Picked, Question
from pipeline.targets import UNLABELLED


class CrossEntropy(ClassLoss):
    """-log q(label) at temperature 1, over the class space of the cache where there is one.

    Attributes:
        label_smoothing: share of the label's mass spread evenly over all classes.
        class_weights: how much a label counts, by the name of its class or its id; 1 where left
            out. The mean is weighted, as that of PyTorch's own weighted cross-entropy.
    """

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    class_weights: dict[int | str, Annotated[float, Field(ge=0.0)]] = {}

    @property
    def unit(self) -> Unit:
        return "labels"

    def name_classes(self, names: Sequence[str] | None) -> Self:
        found = {_find_class(key, names): weight for key, weight in self.class_weights.items()}
        return self.model_copy(update={"class_weights": found})

    def weights(self, knowledge: Knowledge) -> Tensor | None:
        weights, labels = super().weights(knowledge), knowledge.label_ids
        if not self.class_weights:
            return weights
        if weights is None:
            weights = (labels != UNLABELLED).float()
        for key, weight in self.class_weights.items():
            weights = torch.where(labels == _find_class(key, None), weight * weights, weights)
        return weights

    def pose(self, knowledge: Knowledge, width: int) -> Question:
        """The label's score against all others; 0 nats where there is no label."""
        num_classes = width if knowledge.targets is None else knowledge.targets.num_classes
        return ask_label(knowledge.label_ids, num_classes, self.label_smoothing)


class PseudoLabel(ClassLoss):
    """-log q(the teacher's first choice): hard labels where there are none (Lee 2013).

    The choice is the kept class with the highest logit; of the draws where no class was kept. With
    `positions: {keep: {min_confidence: 0.9}}` it is learned only where the teacher is sure.

    Attributes:
        label_smoothing: share of the choice's mass spread evenly over all classes.
    """

    name: Literal["pseudo_label"] = "pseudo_label"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def unit(self) -> Unit:
        return "targets"

    def pose(self, knowledge: Knowledge, width: int) -> Question:
        """The choice's score against all others.

        Raises:
            ConfigError: there are no targets.
        """
        targets = self.targets_of(knowledge)
        return ask_label(targets.first_choice()[0], targets.num_classes, self.label_smoothing)


def ask_label(label_ids: Tensor, num_classes: int, smoothing: float = 0.0) -> Question:
    """-log q(label) in nats, [N]; 0 where there is no label.

    Args:
        label_ids: [N] int64, UNLABELLED where there is none.
        num_classes: V.
        smoothing: share of the label's mass spread evenly over all classes.
    """
    labelled = label_ids != UNLABELLED

    def answer(picked: Picked) -> Tensor:
        # A row without a label has no score; any number does, since it is masked below.
        score = torch.where(labelled, picked.scores[:, 0], 0.0)
        losses = functional.softplus(picked.others - score)
        if picked.mean is not None:
            uniform = torch.logaddexp(score, picked.others) - picked.mean
            losses = (1.0 - smoothing) * losses + smoothing * uniform
        return torch.where(labelled, losses, 0.0)

    return Question(
        ids=torch.where(labelled, label_ids, num_classes)[:, None],
        num_classes=num_classes,
        answer=answer,
        exclude=True,
        mean=smoothing > 0.0,
    )


def _find_class(key: int | str, names: Sequence[str] | None) -> int:
    """The id of a class that is given by its name or id; a number may have been read as a text."""
    known = list(names or [])
    if key in known:
        return known.index(str(key))
    if not str(key).isdigit() or (known and int(key) >= len(known)):
        hint = did_you_mean(str(key), known) if known else "; the classes have no names, use ids"
        raise ConfigError(f"class_weights: {key!r} is no class{hint}")
    return int(key)
