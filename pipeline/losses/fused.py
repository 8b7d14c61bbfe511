"""The output head and the losses in one: no logits of all positions, gradients in one pass.

    hidden [n, D] -- head --> scores of a chunk [n, V] -- softmax, in place --> Picked -- answers
    of all losses --> gradient of the chunk, in place --> gradients of hidden, weight and bias

Each chunk of positions goes through one buffer, from logits to their gradient, and is forgotten.
The losses at one temperature share its exponentials. Gradients are computed with the values,
because the weight of every term is known before: what comes back later is one factor for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.heads import OutputHead
from pipeline.losses.base import Knowledge, StudentOutputs
from pipeline.losses.classes import Asking
from pipeline.losses.softmax import SharedSoftmax

_CPU_CHUNK = 1 << 22  # elements of a chunk, 16 MB of float32, where that is many positions
_GPU_CHUNK = 1 << 28  # 1 GiB of float32
_MOST_ROWS = 512  # with more positions the matrix products do not get faster
_FEWEST_ROWS = 200  # with fewer they wait for the weights to come from memory
_SHARE = 10  # between the two, this part of the positions


class FusedHead:
    """An output head that answers losses instead of giving logits.

    Its one buffer is kept from call to call: fresh memory of that size costs more than the
    arithmetic on it.
    """

    def __init__(self, head: OutputHead) -> None:
        self.head = head
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def sum_terms(
        self,
        losses: Sequence[Asking],
        hidden: Tensor,
        knowledge: Knowledge,
        factors: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Sum each loss over all positions.

        Args:
            losses: at least one.
            hidden: [N, D], the head's own input at the target positions.
            knowledge: of the same N positions.
            factors: of each loss in the total, scalars: its weight over what it is divided by.

        Returns:
            The sum of factor times loss, a scalar with a gradient, and each loss's own sum, [L]
            without; float32, or float64 of float64 weights.
        """
        total, sums = _SumTerms.apply(
            hidden, self.head.weight, self.head.bias, self, tuple(losses), knowledge, tuple(factors)
        )
        return total, sums

    def buffer(self, name: str, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A [rows, V + 1] view of kept memory; column V is the class that is none."""
        width = self.head.num_classes + 1
        stride = -(-width // 16) * 16  # rows begin at a cache line
        key = (name, dtype, like.device)
        kept = self._buffers.get(key)
        if kept is None or len(kept) < rows:
            kept = torch.empty(rows, stride, dtype=dtype, device=like.device)
            self._buffers[key] = kept
        return kept[:rows, :width]


class _SumTerms(torch.autograd.Function):
    """Values and gradients together; backward only scales what is already there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fused: FusedHead,
        losses: tuple[Asking, ...],
        knowledge: Knowledge,
        factors: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            work = _Work(fused, losses, factors, hidden, weight, bias, half, ctx.needs_input_grad)
            for rows in work.chunks():
                work.run(rows, _slice(knowledge, rows))
        ctx.gradients = work.gradients()
        ctx.mark_non_differentiable(work.sums)
        return (work.sums * work.factors).sum(), work.sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Any, ...]:
        gradients = ctx.gradients
        del ctx.gradients
        if factor.device.type != "cpu" or float(factor) != 1.0:
            gradients = [None if g is None else g.mul_(factor.to(g.dtype)) for g in gradients]
        return (*gradients, None, None, None, None)


class _Work:
    """One pass over all positions: the sums, and the gradients that are wanted."""

    def __init__(
        self,
        fused: FusedHead,
        losses: tuple[Asking, ...],
        factors: tuple[Tensor, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        half: torch.dtype | None,
        wanted: Sequence[bool],
    ) -> None:
        self.fused, self.losses = fused, losses
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.factors = torch.stack(factors).to(hidden.device, self.dtype)
        self.classes = fused.head.num_classes
        product = half or weight.dtype  # of the matrix products
        self._given = (hidden, weight, bias)
        self.hidden = hidden.detach().to(product)
        self.weight = weight.detach()[: self.classes].to(product)
        self.bias = None if bias is None else bias.detach()[: self.classes].to(self.dtype)
        self.sums = torch.zeros(len(losses), dtype=self.dtype, device=hidden.device)
        wants_hidden, wants_weight, wants_bias = wanted[:3]
        self.wants_gradient = any(wanted[:3])
        self.grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        zeros = partial(torch.zeros, dtype=self.dtype, device=hidden.device)
        self.grad_weight = zeros(weight.shape) if wants_weight else None
        self.grad_bias = zeros(len(weight)) if bias is not None and wants_bias else None

    def chunks(self) -> Iterator[slice]:
        """Positions that go through the buffer together."""
        total, step = len(self.hidden), self._chunk_rows()
        for start in range(0, total, step):
            yield slice(start, min(start + step, total))

    def _chunk_rows(self) -> int:
        positions = len(self.hidden)
        most = _CPU_CHUNK if self.hidden.device.type == "cpu" else _GPU_CHUNK
        rows = min(_MOST_ROWS, max(_FEWEST_ROWS, positions // _SHARE))
        rows = max(most // self.classes, rows)
        return max(1, min(positions, rows))

    def run(self, rows: slice, knowledge: Knowledge) -> None:
        """Answer every loss for one chunk, and add its gradient to those of head and hidden."""
        hidden = self.hidden[rows]
        questions = [loss.question(knowledge, self.classes) for loss in self.losses]
        temperatures = list(dict.fromkeys(q.temperature for q in questions))
        logits, bend = self._logits(hidden, "0")
        parts, sums = [], torch.zeros_like(self.sums)
        for index, temperature in enumerate(temperatures):
            asked = [i for i, q in enumerate(questions) if q.temperature == temperature]
            scores = logits
            if index + 1 < len(temperatures):  # the last works on the logits themselves
                scores = self.fused.buffer(str(index + 1), len(hidden), hidden, self.dtype)
                scores.copy_(logits)
            group = [questions[i] for i in asked]
            parts.append(SharedSoftmax(scores, temperature, group))
            if parts[-1].is_lost:
                self._run_plainly(rows, knowledge)
                return
            sums[asked] = parts[-1].answer(self.factors[asked], self.wants_gradient)
        self.sums += sums
        if not self.wants_gradient:
            return
        gradients = [part.gradient()[:, : self.classes] for part in parts]
        gradient = gradients[-1]
        for other in gradients[:-1]:
            gradient += other
        if bend is not None:
            gradient *= bend
        self._push(rows, gradient)

    def _logits(self, hidden: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk in a buffer, [n, V + 1], and the slope of the soft-cap, [n, V]."""
        head = self.fused.head
        buffer = self.fused.buffer(name, len(hidden), hidden, self.dtype)
        logits = buffer[:, :-1]
        if self.weight.dtype == self.dtype:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            logits.copy_(torch.mm(hidden, self.weight.t()))
        if self.bias is not None:
            logits += self.bias
        if head.scale != 1.0:
            logits *= head.scale
        buffer[:, -1] = -torch.inf
        if head.soft_cap is None:
            return self._offset(buffer), None
        bend = self.fused.buffer("bend", len(hidden), hidden, self.dtype)[:, :-1]
        logits.div_(head.soft_cap).tanh_()
        torch.mul(logits, logits, out=bend).neg_().add_(1.0)
        logits *= head.soft_cap
        return self._offset(buffer), bend

    def _offset(self, buffer: Tensor) -> Tensor:
        offset = self.fused.head.offset
        if offset is not None:
            buffer[:, :-1] += offset[: self.classes].to(buffer)
        return buffer

    def _run_plainly(self, rows: slice, knowledge: Knowledge) -> None:
        """A chunk in which some row has hardly any mass where it is asked for: loss by loss."""
        buffer, bend = self._logits(self.hidden[rows], "0")
        logits = buffer[:, :-1].clone().requires_grad_()
        with torch.enable_grad():
            student = StudentOutputs(logits)
            values = [
                loss.question(knowledge, self.classes).ask(student.logits).sum()
                for loss in self.losses
            ]
            stacked = torch.stack(values)
            total = (stacked * self.factors.to(stacked)).sum()
        self.sums += stacked.detach()
        if self.wants_gradient:
            (gradient,) = torch.autograd.grad(total, logits)
            self._push(rows, gradient if bend is None else gradient * bend)

    def _push(self, rows: slice, gradient: Tensor) -> None:
        """From the gradient of a chunk's logits to those of head and hidden."""
        scale = self.fused.head.scale
        if self.grad_bias is not None:
            self.grad_bias[: self.classes] += gradient.sum(dim=0) * scale
        gradient = gradient.to(self.weight.dtype)
        if self.grad_hidden is not None:
            mine = torch.mm(gradient, self.weight)
            self.grad_hidden[rows] = mine if scale == 1.0 else mine * scale
        if self.grad_weight is not None:
            target = self.grad_weight[: self.classes]
            if gradient.dtype == target.dtype:
                target.addmm_(gradient.t(), self.hidden[rows], alpha=scale)
            else:
                target += torch.mm(gradient.t(), self.hidden[rows]) * scale

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight and bias, in their own dtypes."""
        found = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return [
            None if grad is None or given is None else grad.to(given.dtype)
            for grad, given in zip(found, self._given, strict=True)
        ]


def _slice(knowledge: Knowledge, rows: slice) -> Knowledge:
    targets = knowledge.targets
    return replace(
        knowledge,
        targets=None if targets is None else targets.select(rows),
        label_ids=knowledge.label_ids[rows],
        hidden={},
        shares={unit: share[rows] for unit, share in knowledge.shares.items()},
        others={name: _slice(other, rows) for name, other in knowledge.others.items()},
        rows=rows,
    )
