"""The student's class space read at few classes, which is all that a sparse loss needs of it.

    Question (ids, temperature) + logits [N, V'] -- pick_classes --> Picked -- answer --> [N] values

Everything follows from the scores of the picked classes and one logsumexp, by arithmetic on [N, K].
Rows go through one small buffer that stays in the processor's cache, so that neither the forward
nor the backward pass holds a [N, V] temporary beside the logits and their gradient. `fused` answers
the same questions without the logits.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.losses.base import Knowledge, StudentOutputs
from pipeline.losses.weighting import LogitLoss, weigh

_CPU_ELEMENTS = 1 << 20  # 4 MB of float32: measured fastest of 2^16 .. 2^22 at V = 32,000
_GPU_ELEMENTS = 1 << 26  # 256 MB of float32: large enough to fill a device, small beside its memory


@dataclass(frozen=True)
class Picked:
    """What a question asked of N rows of logits z.

    Attributes:
        scores: [N, K] float32 (float64 of float64 logits), z / T at the picked classes.
        others: [N], logsumexp(z / T) over all classes, or over all but the picked ones.
        mean: [N], the mean of z / T over all classes, where it was asked for.
    """

    scores: Tensor
    others: Tensor
    mean: Tensor | None = None


@dataclass(frozen=True)
class Question:
    """What a loss wants to know of the student's logits at N positions, and what it makes of it.

    Attributes:
        ids: [N, K] int64; the id V means "nothing": its score is -inf and excludes no class.
        num_classes: V.
        answer: Picked -> one value per position, [N].
        temperature: T.
        exclude: leave the picked classes out of the logsumexp.
        mean: whether the mean of the scores over all classes is wanted.
    """

    ids: Tensor
    num_classes: int
    answer: Callable[[Picked], Tensor]
    temperature: float = 1.0
    exclude: bool = False
    mean: bool = False

    def ask(self, logits: Tensor) -> Tensor:
        """The answer to given logits [N, V'], [N]."""
        scores, others = pick_classes(
            logits,
            self.ids,
            self.num_classes,
            temperature=self.temperature,
            exclude=self.exclude,
        )
        mean = None
        if self.mean:
            mean = logits[:, : self.num_classes].mean(dim=1, dtype=scores.dtype) / self.temperature
        return self.answer(Picked(scores, others, mean))


class Asking(Protocol):
    """What a fused head answers."""

    def question(self, knowledge: Knowledge, width: int) -> Question:
        """What is asked of logits [N, width] at the N positions of the knowledge."""


class ClassLoss(LogitLoss):
    """A loss that reads the student's logits at few classes."""

    def question(self, knowledge: Knowledge, width: int) -> Question:
        """What it asks of logits [N, width] at the N positions of the knowledge.

        Raises:
            ConfigError: the knowledge lacks what the loss is told to read.
        """
        knowledge = knowledge.of(self.teacher)
        question, weights = self.pose(knowledge, width), self.weights(knowledge)
        share = knowledge.shares.get(self.unit)
        if share is not None:
            weights = share if weights is None else weights * share
        if weights is None:
            return question
        return replace(question, answer=lambda picked: weigh(question.answer(picked), weights))

    @abstractmethod
    def pose(self, knowledge: Knowledge, width: int) -> Question:
        """The question, all positions alike."""

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return one value per target position, [N]; see `question` for what is refused."""
        return self.question(knowledge, student.logits.shape[1]).ask(student.logits)


def pick_classes(
    logits: Tensor,
    ids: Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    exclude: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return z / T at the picked classes, and logsumexp(z / T) over all classes or all others.

    Classes beyond `num_classes` are padding of the student's head: they count nowhere and their
    gradient is exactly 0. The logsumexp of the others is computed from their own scores, never as
    1 - sum, so that it is accurate however little mass they hold.

    Args:
        logits: [N, V'] of any floating type, V' >= V; half precision is computed in float32.
        ids: [N, K] int64; the id V means "nothing": its score is -inf and excludes no class.
        num_classes: V.
        temperature: T.
        exclude: leave the picked classes out of the logsumexp.

    Returns:
        scores [N, K] and logsumexp [N], float32 (float64 for float64 logits).

    Raises:
        ModelError: the student's head has fewer classes than the teacher's.
    """
    if logits.shape[1] < num_classes:
        raise ModelError(
            f"student: its head has {logits.shape[1]:,} classes, the targets {num_classes:,};"
            " use a student whose head covers the class space of the cache"
        )
    picked, others = _PickClasses.apply(logits, ids, num_classes, temperature, exclude)
    return picked, others


class _PickClasses(torch.autograd.Function):
    """Scores and logsumexp with a backward pass that writes the one gradient and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, num_classes: int, temperature: float, exclude: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.num_classes, ctx.temperature, ctx.exclude = num_classes, temperature, exclude
        dtype = torch.promote_types(logits.dtype, torch.float32)
        picked = torch.empty(ids.shape, dtype=dtype, device=logits.device)
        others = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for rows, scores in _chunks(logits, num_classes, temperature, dtype):
            torch.gather(scores, 1, ids[rows], out=picked[rows])
            if exclude:
                scores.scatter_(1, ids[rows], -torch.inf)
            others[rows] = _logsumexp_inplace(scores)
        ctx.save_for_backward(logits, ids, others)
        return picked, others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_picked: Tensor, grad_others: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits, ids, others = ctx.saved_tensors
        grad = torch.empty_like(logits)
        grad[:, ctx.num_classes :] = 0
        shift = others.masked_fill(others == -torch.inf, 0.0)[:, None]
        grad_others = (grad_others / ctx.temperature)[:, None]
        grad_picked = grad_picked / ctx.temperature
        for rows, scores in _chunks(logits, ctx.num_classes, ctx.temperature, others.dtype):
            if ctx.exclude:
                scores.scatter_(1, ids[rows], -torch.inf)
            scores.sub_(shift[rows]).exp_().mul_(grad_others[rows])
            scores.scatter_add_(1, ids[rows], grad_picked[rows])
            grad[rows, : ctx.num_classes] = scores[:, :-1]
        return grad, None, None, None, None


def _chunks(
    logits: Tensor, num_classes: int, temperature: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, z / T of these rows) in a reused buffer with one column more, always -inf.

    The last column is the class V of `ids`: writes to it are lost, reads of it say -inf.
    """
    elements = _CPU_ELEMENTS if logits.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, min(len(logits), elements // (num_classes + 1)))
    buffer = torch.empty(step, num_classes + 1, dtype=dtype, device=logits.device)
    for start in range(0, len(logits), step):
        rows = slice(start, min(start + step, len(logits)))
        scores = buffer[: rows.stop - start]
        scores[:, :-1] = logits[rows, :num_classes]
        if temperature != 1.0:
            scores.div_(temperature)
        scores[:, -1] = -torch.inf
        yield rows, scores


def _logsumexp_inplace(scores: Tensor) -> Tensor:
    peak = scores.amax(dim=1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)  # -inf - -inf would be NaN
    return scores.sub_(peak).exp_().sum(dim=1).log_() + peak[:, 0]
