"""What stands for the classes that were not kept, in a divergence sum_i p_i f(p_i / q_i).

    SparseDistribution, f -- ask_bucket | ask_draws | ask_kept --> Question --> [N] nats

p is the teacher, q the student, both at temperature T; S the kept classes, m = 1 - sum_S p. f takes
r = log p - log q and is 0 at 0, so that every form is 0 where the student is the teacher.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.losses.classes import Picked, Question
from pipeline.targets import SparseDistribution

Ratio = Callable[[Tensor], Tensor]


def ask_bucket(teacher: SparseDistribution, f: Ratio, temperature: float = 1.0) -> Question:
    """The divergence over the kept classes and one outcome more: m against 1 - sum_S q, [N] nats.

    0 <= D_bucket <= D_dense, growing with K (the data-processing inequality), equal at K = V.

    Args:
        teacher: the teacher at this temperature.
        f: of the divergence.
        temperature: T.
    """

    def answer(picked: Picked) -> Tensor:
        log_probs, student = outcomes(teacher, picked)
        return _weigh(f, log_probs.exp(), log_probs, student)

    ids = ids_or_nothing(teacher.ids, teacher.log_probs, teacher.num_classes)
    return Question(ids, teacher.num_classes, answer, temperature, exclude=True)


def outcomes(teacher: SparseDistribution, picked: Picked) -> tuple[Tensor, Tensor]:
    """log p and log q of the kept classes and, last, of all others together, each [N, K + 1]."""
    student = torch.cat([picked.scores, picked.others[:, None]], dim=1)
    log_tail = teacher.tail_mass.to(student.dtype).log()[:, None]
    log_probs = torch.cat([teacher.log_probs.to(student.dtype), log_tail], dim=1)
    return log_probs, student - torch.logsumexp(student, dim=1, keepdim=True)


def ask_draws(teacher: SparseDistribution, f: Ratio, temperature: float = 1.0) -> Question:
    """sum_S p f(p/q) + sum_j w_j f(p_j/q_j) over the draws j, [N] nats.

    An unbiased estimate of the dense divergence, and so is its gradient; exact where every class is
    kept. A single estimate may be negative.

    Args:
        teacher: the teacher at this temperature, with its draws.
        f: of the divergence.
        temperature: T.
    """
    ids, log_probs = teacher.ids, teacher.log_probs
    weights = log_probs.exp()
    if ids.shape[1] < teacher.num_classes:
        ids = torch.cat([ids, teacher.draw_ids], dim=1)
        log_probs = torch.cat([log_probs, teacher.draw_log_probs], dim=1)
        weights = torch.cat([weights, teacher.draw_weights], dim=1)
    return _ask_weighted(f, ids, weights, log_probs, teacher.num_classes, temperature)


def ask_kept(teacher: SparseDistribution, f: Ratio, temperature: float = 1.0) -> Question:
    """D(p / sum_S p || q) over the kept classes, [N] nats; 0 where none is kept.

    Biased: its optimum puts nothing on the tail.

    Args:
        teacher: the teacher at this temperature.
        f: of the divergence.
        temperature: T.
    """
    kept_mass = torch.logsumexp(teacher.log_probs, dim=1, keepdim=True)
    log_probs = teacher.log_probs - kept_mass.masked_fill(kept_mass == -torch.inf, 0.0)
    ids, num_classes = teacher.ids, teacher.num_classes
    return _ask_weighted(f, ids, log_probs.exp(), log_probs, num_classes, temperature)


def ids_or_nothing(ids: Tensor, log_probs: Tensor, num_classes: int) -> Tensor:
    """Point entries without probability (padding of a short row) at the class that is none."""
    return ids.masked_fill(log_probs == -torch.inf, num_classes)


def _ask_weighted(
    f: Ratio,
    ids: Tensor,
    weights: Tensor,
    log_probs: Tensor,
    num_classes: int,
    temperature: float,
) -> Question:
    """sum w f(p/q) over entries [N, K] of the student's distribution q."""

    def answer(picked: Picked) -> Tensor:
        student = picked.scores - picked.others[:, None]
        return _weigh(f, weights.to(student), log_probs.to(student), student)

    return Question(ids_or_nothing(ids, log_probs, num_classes), num_classes, answer, temperature)


def _weigh(f: Ratio, weights: Tensor, log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """sum w f(log p - log q) over the last dimension, where p = 0 adds nothing."""
    present = log_probs > -torch.inf
    log_probs = torch.where(present, log_probs, 0.0)
    student_log_probs = torch.where(present, student_log_probs, 0.0)
    return (torch.where(present, weights, 0.0) * f(log_probs - student_log_probs)).sum(dim=1)
