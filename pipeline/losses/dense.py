"""Learning from the whole distribution: the teacher's output head on what it was given.

hidden [N, D] of the cache -- teacher's head --> logits [n, V], a chunk at a time --> softmax(z / T)
student logits [N, V'] -- softmax --> KL x T², and its gradient in the same pass
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from pipeline.errors import ConfigError, ModelError
from pipeline.heads import OutputHead
from pipeline.losses.base import Knowledge, StudentOutputs, Unit
from pipeline.losses.weighting import LogitLoss, weigh

HEAD = "head"  # the signal: what the teacher's output head was given at each target
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 22, 1 << 26  # of the teacher's logits that are made at a time


class TeacherHead(nn.Module):
    """A teacher's output head beside a loss: it moves with the student and learns nothing."""

    weight: Tensor
    bias: Tensor | None
    offset: Tensor | None

    def __init__(self, head: OutputHead) -> None:
        super().__init__()
        self._head = head
        self.register_buffer("weight", head.weight, persistent=False)
        self.register_buffer("bias", head.bias, persistent=False)
        self.register_buffer("offset", head.offset, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of what the head is given: [n, D] -> [n, V] float32."""
        head = self._head
        moved = replace(head, weight=self.weight, bias=self.bias, offset=self.offset)
        return moved(hidden)


class DenseKL(LogitLoss):
    """KL over all classes, at any temperature, times T²: nothing is cut off and nothing estimated.

    It needs a cache with `hidden.head`: the vectors that the teacher's output head was given, and
    the head itself, from which all logits are made again. How exact that is, is decided by the
    dtype that the vectors are kept in. It needs the logits of all classes of the student too.

    Attributes:
        temperature: T, cached or not.
        reverse: KL(student || teacher) instead.
    """

    name: Literal["dense_kl"] = "dense_kl"
    temperature: float = Field(default=1.0, gt=0.0)
    reverse: bool = False
    _head: OutputHead | None = PrivateAttr(default=None)

    def hear(self, read_head: Callable[[], OutputHead]) -> Self:
        """See `Loss.hear`."""
        heard = self.model_copy()
        heard._head = read_head()
        return heard

    def projections(self, student_width: int, teacher_width: int) -> nn.ModuleDict:
        """The teacher's head, which learns nothing and is left out of checkpoints."""
        return nn.ModuleDict({} if self._head is None else {HEAD: TeacherHead(self._head)})

    @property
    def unit(self) -> Unit:
        return "targets"

    @property
    def gradient_scale(self) -> float:
        return self.temperature**2

    @property
    def needs_all_logits(self) -> bool:
        return True

    @property
    def teacher_signals(self) -> tuple[str, ...]:
        return (HEAD,)

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return T² KL in nats per target position, [N].

        Raises:
            ConfigError: the cache keeps no head, or not at every target.
            ModelError: the student's head has fewer classes than the teacher's.
        """
        given = knowledge.hidden.get(HEAD)
        if given is None or len(given) != len(student.logits) or HEAD not in projections:
            raise ConfigError(
                "dense_kl: what the teacher's head was given is needed at every target; cache the"
                " teacher with hidden.head: true"
            )
        head = projections[HEAD]
        assert isinstance(head, TeacherHead)
        classes = head.weight.shape[0]
        if student.logits.shape[1] < classes:
            raise ModelError(
                f"student: its head has {student.logits.shape[1]:,} classes, the teacher's"
                f" {classes:,}; use a student whose head covers the class space of the cache"
            )
        values = _dense_kl(student.logits, given, head, self.temperature, self.reverse)
        return weigh(values * self.temperature**2, self.weights(knowledge))


def _dense_kl(
    logits: Tensor, given: Tensor, head: TeacherHead, temperature: float, reverse: bool
) -> Tensor:
    """KL of N rows, [N]; the gradient by the logits is made in the same pass."""
    values: Tensor = _DenseKL.apply(logits, given, head, temperature, reverse)
    return values


class _DenseKL(torch.autograd.Function):
    """Only one buffer of the size of the student's logits: their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        given: Tensor,
        head: TeacherHead,
        temperature: float,
        reverse: bool,
    ) -> Tensor:
        classes = head.weight.shape[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        values = torch.empty(len(logits), dtype=dtype, device=logits.device)
        elements = _CPU_ELEMENTS if logits.device.type == "cpu" else _GPU_ELEMENTS
        step = max(1, elements // classes)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            theirs = (head(given[rows]).to(dtype) / temperature).log_softmax(dim=1)
            mine = (logits[rows, :classes].to(dtype) / temperature).log_softmax(dim=1)
            if reverse:
                slope = mine.exp() * (mine - theirs)
                values[rows] = slope.sum(dim=1)
                slope -= mine.exp() * values[rows, None]
            else:
                said = theirs.exp()
                values[rows] = (said * (theirs - mine)).sum(dim=1)
                slope = mine.exp() - said
            if gradient is not None:
                gradient[rows, :classes] = slope / temperature
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor[:, None].to(gradient.dtype), None, None, None, None
