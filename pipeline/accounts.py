"""What each example adds to the loss: weights by language, and the terms of each language.

examples -> Marks -> batch: shares of the values, slices of the positions
values of a loss -> Ledger -> SliceMeans -> term/forward_kl/language=yor_Latn
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import StrictModel
from pipeline.errors import ConfigError, did_you_mean
from pipeline.examples import Example
from pipeline.losses.base import Knowledge, Loss, Unit
from pipeline.losses.classes import Asking, Picked, Question
from pipeline.targets import UNLABELLED


class ExampleWeights(StrictModel):
    """How much the examples of each language, or of any other value of a column, count.

    Every value of every loss is multiplied by the weight of its example, and what the sum is
    divided by stays the number of units: an example of weight 2 teaches what two would. (Divided by
    the sum of the weights, a step of examples that count little would be as long as any other.)

    Attributes:
        by: the column, carried in the cache or by `inputs`.
        weights: of its values, 1 where left out.
    """

    by: str
    weights: dict[str, Annotated[float, Field(ge=0.0)]]

    def check(self, values: Sequence[str]) -> None:
        """Refuse a weight of what is no value of the column.

        Raises:
            ConfigError: with the nearest value.
        """
        for name in self.weights:
            if name not in values:
                hint = did_you_mean(name, values)
                raise ConfigError(f"example_weights.weights: no {self.by} is {name!r}{hint}")


@dataclass(frozen=True)
class Marks:
    """What a batch tells of its examples by their columns.

    Attributes:
        weights: how much they count; None for all alike.
        slices: column -> the values whose terms are logged, in order.
    """

    weights: ExampleWeights | None = None
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def mark(
        self, batch: Mapping[str, Any], examples: Sequence[Example], features: Tensor
    ) -> dict[str, Any]:
        """A batch with the weights in its `shares`, of every teacher, and with `slices`: unit ->
        [n, columns], places in `slice_names`.

        Args:
            features: [B], how many of the features are each example's.
        """
        numbers = torch.arange(len(examples))
        targets = numbers.repeat_interleave(torch.tensor([len(e.label_ids) for e in examples]))
        owners: dict[Unit, Tensor] = {
            "targets": targets,
            "labels": targets,
            "features": numbers.repeat_interleave(features),
            "examples": numbers,
        }
        found = dict(batch)
        if self.weights is not None:
            weights = self._weigh(examples)
            found |= _share(batch, weights, owners)
            said = batch.get("teachers", {}).items()
            found["teachers"] = {name: part | _share(part, weights, owners) for name, part in said}
        if self.slices:
            places = self._place(examples)
            found["slices"] = {unit: places[owner] for unit, owner in owners.items()}
        return found

    @property
    def slice_names(self) -> list[str]:
        """`column=value` of every slice."""
        return [f"{column}={value}" for column, values in self.slices.items() for value in values]

    def _weigh(self, examples: Sequence[Example]) -> Tensor:
        assert self.weights is not None
        names = [str(example.columns.get(self.weights.by)) for example in examples]
        return torch.tensor([self.weights.weights.get(name, 1.0) for name in names])

    def _place(self, examples: Sequence[Example]) -> Tensor:
        places = {name: place for place, name in enumerate(self.slice_names)}
        return torch.tensor(
            [
                [places[f"{column}={e.columns.get(column)}"] for column in self.slices]
                for e in examples
            ]
        )


def _share(
    said: Mapping[str, Any], weights: Tensor, owners: Mapping[Unit, Tensor]
) -> dict[str, dict[Unit, Tensor]]:
    """The shares of one teacher times the weights of the examples."""
    shares = said.get("shares", {})
    return {
        "shares": {
            unit: weights[owner] * shares[unit] if unit in shares else weights[owner]
            for unit, owner in owners.items()
        }
    }


class Ledger:
    """Every value of one micro-batch's losses, as it enters their sums.

    Attributes:
        values: of each loss, [n] without gradient.
    """

    def __init__(self, losses: int) -> None:
        self.values = [torch.zeros(0) for _ in range(losses)]

    def enter(self, index: int, values: Tensor) -> None:
        """Keep the values of a loss, [n]."""
        self.values[index] = values.detach()

    def wrap(self, index: int, loss: Asking, positions: Tensor) -> "EnteredLoss":
        """A loss for a fused head, whose values at these positions [N] come chunk by chunk."""
        self.values[index] = torch.zeros(len(positions), device=positions.device)
        return EnteredLoss(loss, self.values[index])


@dataclass(frozen=True)
class EnteredLoss:
    """A loss on logits that enters what it is answered, chunk by chunk.

    Attributes:
        values: [N], filled as chunks are asked for; one that is asked for again gives the same.
    """

    loss: Asking
    values: Tensor

    def question(self, knowledge: Knowledge, width: int) -> Question:
        """The question of the loss, whose answer is entered."""
        question = self.loss.question(knowledge, width)
        return replace(question, answer=partial(self._enter, question, knowledge.rows))

    def _enter(self, question: Question, rows: slice, picked: Picked) -> Tensor:
        values = question.answer(picked)
        self.values[rows] = values.detach().to(self.values)
        return values


class SliceMeans:
    """The mean of every term over each slice, since it was last asked for.

    Values count as they do in the loss, with the weights of their examples and teachers.
    """

    def __init__(self, terms: Sequence[str], marks: Marks) -> None:
        self._terms = terms
        self._names = marks.slice_names
        self._sums = torch.zeros(2, len(terms), len(self._names), dtype=torch.float64)

    def add(
        self,
        losses: Sequence[Loss],
        batch: Mapping[str, Any],
        ledger: Ledger,
        knowledge: Knowledge,
    ) -> None:
        """Count a micro-batch; the losses are those of now, in the order of the terms."""
        for index, loss in enumerate(losses):
            values = ledger.values[index] / loss.gradient_scale
            counted = _count(loss, knowledge.of(loss.teacher), values)
            for places in batch["slices"][loss.unit].cpu().unbind(1):
                self._sums[0, index].index_add_(0, places, values.double().cpu())
                self._sums[1, index].index_add_(0, places, counted.double().cpu())

    def take(self) -> Tensor:
        """Sums and counts so far, [2, losses, slices], which begin anew."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums

    def name(self, sums: Tensor) -> dict[str, float]:
        """The means of sums and counts, by term and slice; a slice that had nothing is left out."""
        found = {}
        for index, term in enumerate(self._terms):
            for place, name in enumerate(self._names):
                total, count = sums[:, index, place].tolist()
                if count:
                    found[f"term/{term}/{name}"] = total / count
        return found


def _count(loss: Loss, knowledge: Knowledge, values: Tensor) -> Tensor:
    """What each value counts towards the mean of its loss, [n]."""
    weights = loss.weights(knowledge)
    if weights is not None:
        return weights
    if loss.unit == "labels":
        return knowledge.label_ids != UNLABELLED
    return torch.ones_like(values)
