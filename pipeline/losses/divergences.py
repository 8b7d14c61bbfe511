"""Divergences between the teacher's sparse distribution and the student, one value per position.

    Targets -- at(T) --> SparseDistribution -- ask_bucket | ask_draws | ask_kept --> Question
    student logits --> Picked --> KL x T²

p is the teacher, q the student, both at temperature T; S the kept classes, m = 1 - sum_S p.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, Unit
from pipeline.losses.classes import ClassLoss, Picked, Question
from pipeline.targets import SparseDistribution

Tail = Literal["auto", "bucket", "draws", "renormalise"]


class ForwardKL(ClassLoss):
    """KL(teacher || student) at a cached temperature, times T².

    T² keeps the size of the gradient, and so the balance with the other losses, the same at every
    temperature (Hinton et al. 2015).

    Attributes:
        temperature: T, one of those that were cached.
        tail: what stands for the classes that were not kept. "bucket": one outcome with all their
            mass; little noise, a lower bound of the dense KL. "draws": the cached draws; unbiased,
            noisier. "auto": draws where the cache holds some, else bucket. "renormalise": nothing,
            the kept probabilities are scaled to sum to 1; biased towards over-confident students,
            here to compare with.
    """

    name: Literal["forward_kl"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0.0)
    tail: Tail = "auto"

    @property
    def unit(self) -> Unit:
        return "targets"

    @property
    def temperature_needed(self) -> float:
        return self.temperature

    def question(self, knowledge: Knowledge, width: int) -> Question:
        """T² KL in nats per target position.

        Raises:
            ConfigError: there are no targets, the temperature was not cached, or `tail: draws` is
                asked of a cache without draws.
        """
        if knowledge.targets is None:
            raise ConfigError(
                "forward_kl: a teacher's targets are needed, found none; give a cache"
            )
        question = self._divergence(knowledge.targets.at(self.temperature))
        return replace(
            question, answer=lambda picked: self.temperature**2 * question.answer(picked)
        )

    def _divergence(self, teacher: SparseDistribution) -> Question:
        draws = teacher.draw_ids.shape[1] > 0
        whole = teacher.ids.shape[1] == teacher.num_classes
        if self.tail == "renormalise":
            return ask_kept(teacher, self.temperature)
        if self.tail == "draws" and not (draws or whole):
            raise ConfigError(
                "forward_kl: tail: draws, but the cache holds no draws; use tail: bucket, or cache"
                " the teacher with targets.tail_draws"
            )
        if whole or (draws and self.tail != "bucket"):
            return ask_draws(teacher, self.temperature)
        return ask_bucket(teacher, self.temperature)


def ask_bucket(teacher: SparseDistribution, temperature: float = 1.0) -> Question:
    """KL over the kept classes and one outcome more: m against 1 - sum_S q, [N] nats.

    0 <= KL_bucket <= KL_dense, growing with K (the data-processing inequality), equal at K = V.

    Args:
        teacher: the teacher at this temperature.
        temperature: T.
    """

    def answer(picked: Picked) -> Tensor:
        outcomes = torch.cat([picked.scores, picked.others[:, None]], dim=1)
        log_tail = teacher.tail_mass.to(outcomes.dtype).log()[:, None]
        log_probs = torch.cat([teacher.log_probs.to(outcomes.dtype), log_tail], dim=1)
        normaliser = torch.logsumexp(outcomes, dim=1, keepdim=True)
        return _weighted_log_ratio(log_probs.exp(), log_probs, outcomes - normaliser)

    ids = _ids_or_nothing(teacher.ids, teacher.log_probs, teacher.num_classes)
    return Question(ids, teacher.num_classes, answer, temperature, exclude=True)


def ask_draws(teacher: SparseDistribution, temperature: float = 1.0) -> Question:
    """sum_S p (log p - log q) + sum_j w_j (log p_j - log q_j) over the draws j, [N] nats.

    An unbiased estimate of the dense KL, and so is its gradient; exact where every class is kept.
    A single estimate may be negative.

    Args:
        teacher: the teacher at this temperature, with its draws.
        temperature: T.
    """
    ids, log_probs = teacher.ids, teacher.log_probs
    weights = log_probs.exp()
    if ids.shape[1] < teacher.num_classes:
        ids = torch.cat([ids, teacher.draw_ids], dim=1)
        log_probs = torch.cat([log_probs, teacher.draw_log_probs], dim=1)
        weights = torch.cat([weights, teacher.draw_weights], dim=1)
    return _ask_weighted(ids, weights, log_probs, teacher.num_classes, temperature)


def ask_kept(teacher: SparseDistribution, temperature: float = 1.0) -> Question:
    """KL(p / sum_S p || q) over the kept classes, [N] nats; 0 where none is kept.

    Biased: its optimum puts nothing on the tail.

    Args:
        teacher: the teacher at this temperature.
        temperature: T.
    """
    kept_mass = torch.logsumexp(teacher.log_probs, dim=1, keepdim=True)
    log_probs = teacher.log_probs - kept_mass.masked_fill(kept_mass == -torch.inf, 0.0)
    return _ask_weighted(teacher.ids, log_probs.exp(), log_probs, teacher.num_classes, temperature)


def _ask_weighted(
    ids: Tensor, weights: Tensor, log_probs: Tensor, num_classes: int, temperature: float
) -> Question:
    """sum w (log p - log q) over entries [N, K] of the student's distribution q."""

    def answer(picked: Picked) -> Tensor:
        scores = picked.scores - picked.others[:, None]
        return _weighted_log_ratio(weights.to(scores), log_probs.to(scores), scores)

    return Question(_ids_or_nothing(ids, log_probs, num_classes), num_classes, answer, temperature)


def _ids_or_nothing(ids: Tensor, log_probs: Tensor, num_classes: int) -> Tensor:
    """Point entries without probability (padding of a short row) at the class that is none."""
    return ids.masked_fill(log_probs == -torch.inf, num_classes)


def _weighted_log_ratio(weights: Tensor, log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """sum w (log p - log q) over the last dimension, where 0 (log 0 - ...) is 0."""
    present = log_probs > -torch.inf
    log_probs = torch.where(present, log_probs, 0.0)
    student_log_probs = torch.where(present, student_log_probs, 0.0)
    return (torch.where(present, weights, 0.0) * (log_probs - student_log_probs)).sum(dim=1)
