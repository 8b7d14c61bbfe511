"""Divergences between the teacher's sparse distribution and the student, one value per position.

    Targets -- at(T) --> SparseDistribution -- tail rule --> Question -- student logits --> D x T²

p is the teacher, q the student, both at temperature T. All but the reverse KL are sum_i p_i f(p_i /
q_i) with an f that does not explode where q is large, which is why draws from p can estimate them.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Discriminator, Field, Tag, field_validator
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Unit
from pipeline.losses.classes import ClassLoss, Picked, Question
from pipeline.losses.tails import ask_bucket, ask_draws, ask_kept, ids_or_nothing, outcomes
from pipeline.targets import SparseDistribution

Tail = Literal["auto", "bucket", "draws", "renormalise"]

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Temperature = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[dict[Share, Positive], Tag("steps")],
    Discriminator(lambda value: "steps" if isinstance(value, dict) else "number"),
]

_SMALLEST_TAIL = 2.0**-24  # below this 1 - sum_S p cannot be told from 0 in float32
_FAR = 60.0  # nats beyond which a bounded f has reached its limit


class Divergence(ClassLoss):
    """A distance from the teacher at a cached temperature, times T².

    T² keeps the size of the gradient, and so the balance with the other losses, the same at every
    temperature (Hinton et al. 2015).

    Attributes:
        temperature: T, one of those that were cached; or several, each from a share of all steps
            on: {0.0: 4.0, 0.5: 2.0, 0.8: 1.0} (annealing, Jafari et al. 2021).
    """

    temperature: Temperature = 1.0

    @field_validator("temperature")
    @classmethod
    def _check_start(cls, value: float | dict[float, float]) -> float | dict[float, float]:
        if isinstance(value, dict) and 0.0 not in value:
            raise ValueError("say the temperature at the start, 0.0")
        return value

    @property
    def unit(self) -> Unit:
        return "targets"

    def temperature_at(self, progress: float) -> float:
        """T at progress in [0, 1] of training."""
        if isinstance(self.temperature, float):
            return self.temperature
        return self.temperature[max(begin for begin in self.temperature if begin <= progress)]

    def at(self, progress: float) -> Self:
        if isinstance(self.temperature, float):
            return self
        return self.model_copy(update={"temperature": self.temperature_at(progress)})

    @property
    def temperatures_needed(self) -> Sequence[float]:
        steps = self.temperature
        return [steps] if isinstance(steps, float) else sorted(set(steps.values()))

    @property
    def gradient_scale(self) -> float:
        return self.temperature_at(0.0) ** 2

    def pose(self, knowledge: Knowledge, width: int) -> Question:
        """The scaled divergence in nats per target position.

        Raises:
            ConfigError: there are no targets, the temperature was not cached, or `tail: draws` is
                asked of a cache without draws.
        """
        temperature = self.temperature_at(0.0)
        question = self._diverge(self.targets_of(knowledge).at(temperature), temperature)
        return replace(
            question, answer=lambda picked: self.gradient_scale * question.answer(picked)
        )

    @abstractmethod
    def _diverge(self, teacher: SparseDistribution, temperature: float) -> Question:
        """The divergence from the teacher at this temperature, not scaled."""


class RatioDivergence(Divergence):
    """sum_i p_i f(p_i / q_i), which every tail rule can serve.

    Attributes:
        tail: what stands for the classes that were not kept. "bucket": one outcome with all their
            mass; little noise, a lower bound of the dense value. The shape of the tail is left to
            the student, which drifts where few classes are kept, least under the forward KL: put
            some cross-entropy beside it. "draws": the cached draws; unbiased, noisier. "auto":
            draws where the cache holds some, else bucket. "renormalise": nothing, the kept
            probabilities are scaled to sum to 1; biased towards over-confident students, here to
            compare with.
    """

    tail: Tail = "auto"

    @abstractmethod
    def of_ratio(self, r: Tensor) -> Tensor:
        """f at r = log p - log q, any shape; 0 at 0."""

    def _diverge(self, teacher: SparseDistribution, temperature: float) -> Question:
        draws = teacher.draw_ids.shape[1] > 0
        whole = teacher.ids.shape[1] == teacher.num_classes
        if self.tail == "renormalise":
            return ask_kept(teacher, self.of_ratio, temperature)
        if self.tail == "draws" and not (draws or whole):
            raise ConfigError(
                f"{self.name}: tail: draws, but the cache holds no draws; use tail: bucket, or"
                " cache the teacher with targets.tail_draws"
            )
        if whole or (draws and self.tail != "bucket"):
            return ask_draws(teacher, self.of_ratio, temperature)
        return ask_bucket(teacher, self.of_ratio, temperature)


class ForwardKL(RatioDivergence):
    """KL(p || q): the student covers all that the teacher holds possible (Hinton et al. 2015)."""

    name: Literal["forward_kl"] = "forward_kl"

    def of_ratio(self, r: Tensor) -> Tensor:
        return r


class SkewKL(RatioDivergence):
    """KL to a mixture of both, which bounds it and tames its gradient (DistiLLM, Ko et al. 2024).

    Forward it is KL(p || alpha p + (1 - alpha) q), reverse KL(q || (1 - alpha) p + alpha q). The
    reverse one needs the teacher's probability wherever the student has some, but at most log 1 /
    alpha depends on it, so that both can be estimated from draws.

    Attributes:
        alpha: share of the first argument in the mixture; near 0 it is the plain KL.
        reverse: the reverse one.
    """

    name: Literal["skew_kl"] = "skew_kl"
    alpha: float = Field(default=0.1, gt=0.0, lt=1.0)
    reverse: bool = False

    def of_ratio(self, r: Tensor) -> Tensor:
        return (_skew_reverse if self.reverse else _skew_forward)(r, self.alpha)


class JensenShannon(RatioDivergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, Agarwal et al.
    2024).

    It needs the teacher's probability off the kept set, where the student may have some: the bucket
    gives it as one number. The draws serve too, because what the teacher hardly ever draws enters
    with a bounded weight.

    Attributes:
        beta: 0.5 is symmetric and at most log 2; near 0 the value is beta times the forward KL,
            near 1 it is 1 - beta times the reverse one.
    """

    name: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)

    def of_ratio(self, r: Tensor) -> Tensor:
        other = 1.0 - self.beta
        return self.beta * _skew_forward(r, self.beta) + other * _skew_reverse(r, other)


class TotalVariation(RatioDivergence):
    """sum_i |p_i - q_i| / 2, times T (f-distill, Wen et al. 2023).

    It is sum_i max(p_i - q_i, 0) too, because both sum to 1, and that is what draws estimate. Its
    gradient falls as 1 / T where that of a KL falls as 1 / T², hence the factor.
    """

    name: Literal["total_variation"] = "total_variation"

    @property
    def gradient_scale(self) -> float:
        return self.temperature_at(0.0)

    def of_ratio(self, r: Tensor) -> Tensor:
        return -torch.expm1(-r.clamp(min=0.0))


class ReverseKL(Divergence):
    """KL(q || p): the student keeps to what the teacher holds possible (MiniLLM, Gu et al. 2024).

    It needs the teacher's probability off the kept set, where the student may have some. The bucket
    gives it as one number, and the value is a lower bound of the dense one, equal where every class
    is kept. Draws cannot serve: what the teacher rules out and the student believes is where this
    divergence is large, and it is never drawn, so that their estimate has no useful variance.

    Attributes:
        tail: "bucket", see above; with some cross-entropy beside it, because it leaves the shape of
            the tail to the student. Its mass is taken as at least 6e-8, what float32 can tell from
            nothing, so that a teacher that is sure costs at most 17 nats.
    """

    name: Literal["reverse_kl"] = "reverse_kl"
    tail: Literal["bucket"] = "bucket"

    def _diverge(self, teacher: SparseDistribution, temperature: float) -> Question:
        teacher = replace(teacher, tail_mass=teacher.tail_mass.clamp(min=_SMALLEST_TAIL))

        def answer(picked: Picked) -> Tensor:
            log_probs, student = outcomes(teacher, picked)
            present = (student > -torch.inf) & (log_probs > -torch.inf)
            student = torch.where(present, student, 0.0)
            log_ratio = student - torch.where(present, log_probs, 0.0)
            return torch.where(present, student.exp() * log_ratio, 0.0).sum(dim=1)

        ids = ids_or_nothing(teacher.ids, teacher.log_probs, teacher.num_classes)
        return Question(ids, teacher.num_classes, answer, temperature, exclude=True)


def _skew_forward(r: Tensor, alpha: float) -> Tensor:
    """log p / (alpha p + (1 - alpha) q): at most log 1 / alpha."""
    return -math.log(alpha) - functional.softplus(math.log((1.0 - alpha) / alpha) - r)


def _skew_reverse(r: Tensor, alpha: float) -> Tensor:
    """(q / p) log q / ((1 - alpha) p + alpha q) + (1 - q / p) log 1 / alpha.

    The second term adds nothing over all classes, where p and q sum to 1, and leaves a sum with a
    bound on both sides: log 1 / alpha - odds * log(1 + exp y) / exp y, with odds = (1 - alpha) /
    alpha and y = r + log odds. Without it q / p, which has none, would be the weight of a draw.
    """
    odds = (1.0 - alpha) / alpha
    y = (r + math.log(odds)).clamp(-_FAR, _FAR)
    return -math.log(alpha) - odds * functional.softplus(y) * torch.exp(-y)
