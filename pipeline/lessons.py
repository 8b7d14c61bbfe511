"""Several tasks in one student: an encoder that is shared, and a head for each task.

    Lesson: task, cache, losses, head    Lessons: models by name, one encoder in all of them
    MixedSampler: which lesson a batch is of, and its rows -> LessonsTrainer

A batch is of one lesson. How often each has its turn follows from the lessons' weights, exactly
over an epoch; the order is a pure function of the seed and the epoch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, TrainerCallback
from transformers import TrainingArguments as Arguments

from pipeline.accounts import Ledger
from pipeline.batches import Collator, Selection, StepSampler
from pipeline.curve import Curve
from pipeline.errors import ConfigError
from pipeline.exam import Exam
from pipeline.losses.base import Loss
from pipeline.metrics import Metric
from pipeline.optimizing import LearningRates
from pipeline.terms import count_units, name_terms, weigh_terms
from pipeline.trainer import DistillationTrainer


@dataclass(frozen=True)
class Lesson:
    """One task of a student.

    Attributes:
        name: of its folder and its metrics.
        model: the student with this task's head.
        losses: the terms.
        train: the examples to learn from.
        exam: what it is measured on.
        collator: joins examples into batches, and knows the task.
        weight: how often a batch is of this lesson, relative to the others.
    """

    name: str
    model: PreTrainedModel
    losses: Sequence[Loss]
    train: Selection
    exam: Exam
    collator: Collator
    weight: float

    def curve(self) -> list[Metric]:
        """The metrics of a point of the curve, each under the lesson's name."""
        found = self.exam.curve(self.model)
        return [replace(metric, name=f"{self.name}.{metric.name}") for metric in found]


def share_encoder(models: Sequence[PreTrainedModel]) -> None:
    """Put one encoder into all models: the largest, since some heads need parts others lack.

    Raises:
        ConfigError: their encoders are of different kinds.
    """
    kinds = {type(model.base_model).__name__ for model in models}
    if len(kinds) > 1:
        raise ConfigError(
            f"student: its tasks open encoders of the kinds {', '.join(sorted(kinds))}; choose an"
            " architecture that is the same for all of them"
        )
    encoder = max((model.base_model for model in models), key=lambda m: m.num_parameters())
    for model in models:
        setattr(model, model.base_model_prefix, encoder)


class Lessons(nn.Module):
    """The students of all lessons; what they share is saved once."""

    _keys_to_ignore_on_save = None  # transformers' trainer asks every model for it

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(dict(models))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Every tensor once, under its first name."""
        whole: dict[str, Tensor] = super().state_dict(*args, **kwargs)
        first = _first_names(whole)
        return {name: tensor for name, tensor in whole.items() if first[name] == name}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` gave."""
        first = _first_names(super().state_dict())
        whole = {name: state_dict[own] for name, own in first.items() if own in state_dict}
        return super().load_state_dict(whole, *args, **kwargs)


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    seen: dict[tuple[int, torch.Size], str] = {}
    return {
        name: seen.setdefault((tensor.data_ptr(), tensor.shape), name)
        for name, tensor in tensors.items()
    }


class MixedSampler(Sampler[list[tuple[int, int]]]):
    """Batches of several selections: pairs of a lesson's number and a row.

    An epoch has as many batches as all lessons have, dealt by weight (largest remainder). Each
    lesson goes through its own rows, epoch after epoch of its own, from where it stopped.

    Args:
        samplers: of each lesson.
        weights: how often each has its turn, relative to the others.
        seed: of the order of lessons.
    """

    def __init__(self, samplers: Sequence[StepSampler], weights: Sequence[float], seed: int):
        self._samplers, self._seed, self.epoch = samplers, seed, 0
        steps, shares = sum(map(len, samplers)), np.asarray(weights) / sum(weights)
        counts = np.floor(shares * steps).astype(int)
        left = np.argsort(counts - shares * steps, kind="stable")[: steps - counts.sum()]
        counts[left] += 1
        self.counts: list[int] = counts.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng((self._seed, self.epoch)).shuffle(order)
        streams = [self._stream(number) for number in range(len(self.counts))]
        for number in order.tolist():
            yield _Rows(number, next(streams[number]))  # type: ignore[misc]

    def _stream(self, number: int) -> Iterator[Sequence[int]]:
        """The batches of a lesson from where the epochs before have left it."""
        sampler = self._samplers[number]
        own, skip = divmod(self.epoch * self.counts[number], len(sampler))
        while True:
            sampler.set_epoch(own)
            yield from islice(iter(sampler), skip, None)
            own, skip = own + 1, 0


class _Rows(Sequence[tuple[int, int]]):
    """Rows of one lesson, computed where they are iterated over: skipped ones never are."""

    __slots__ = ("_number", "_rows")

    def __init__(self, number: int, rows: Sequence[int]) -> None:
        self._number, self._rows = number, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self._number, row) for row in self._rows)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class _Mixture(Dataset[Any]):
    """Examples of several lessons by (lesson, row)."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons

    def __len__(self) -> int:
        return sum(len(lesson.train) for lesson in self._lessons)

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, Any]:
        return index[0], self._lessons[index[0]].train[index[1]]


class LessonsTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose batches are of several lessons."""

    def __init__(
        self,
        lessons: Sequence[Lesson],
        args: Arguments,
        evaluate_model: Callable[[nn.Module], Sequence[Metric]] | None,
        curve: Curve,
        seconds_before: float,
        learning_rates: LearningRates | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """Join the lessons' models.

        Raises:
            ConfigError: several processes.
        """
        if args.world_size > 1:
            raise ConfigError(
                "training: several tasks are learned by one process;"
                " start it without torchrun or accelerate launch"
            )
        self.lessons = lessons
        super().__init__(
            Lessons({lesson.name: lesson.model for lesson in lessons}),
            [loss for lesson in lessons for loss in lesson.losses],
            lessons[0].train,
            lessons[0].collator,
            args,
            evaluate_model=evaluate_model,
            curve=curve,
            seconds_before=seconds_before,
            learning_rates=learning_rates,
            callbacks=callbacks,
        )
        self.term_names = [
            f"{lesson.name}/{name}" for lesson in lessons for name in name_terms(lesson.losses)
        ]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one lesson each; `lesson` is its number."""
        args, size = self.args, self._train_batch_size
        samplers = [
            StepSampler(lesson.train.deal or len(lesson.train), size, args.seed + number)
            for number, lesson in enumerate(self.lessons)
        ]

        def collate(numbered: Sequence[tuple[int, Any]]) -> dict[str, Any]:
            number = numbered[0][0]
            batch = self.lessons[number].collator([example for _, example in numbered])
            return {**batch, "lesson": number}

        weights = [lesson.weight for lesson in self.lessons]
        return DataLoader(
            _Mixture(self.lessons),
            batch_sampler=MixedSampler(samplers, weights, args.seed),
            collate_fn=collate,
        )

    def _count_units(self, batch: Mapping[str, Any]) -> Tensor:
        mine, units = self._terms(batch["lesson"]), torch.zeros(len(self.losses))
        units[mine] = count_units(self.losses[mine], batch)
        return units

    def _weigh_terms(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        losses: Sequence[Loss],
        factors: Sequence[Tensor],
        ledger: Ledger | None,
    ) -> tuple[Tensor, Tensor, Any]:
        number = batch["lesson"]
        lesson, mine = self.lessons[number], self._terms(number)
        total, found, outputs = weigh_terms(
            lesson.model,
            batch,
            losses[mine],
            factors[mine],
            self._fused_head(lesson.model, batch),
            lesson.collator.task,
        )
        sums = found.new_zeros(len(self.losses))
        sums[mine] = found
        return total, sums, outputs

    def _terms(self, number: int) -> slice:
        """Which of all losses are those of a lesson."""
        start = sum(len(lesson.losses) for lesson in self.lessons[:number])
        return slice(start, start + len(self.lessons[number].losses))
