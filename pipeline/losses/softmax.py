"""Many questions at one temperature, answered from one set of exponentials.

logits of a chunk [n, V + 1] -- exp, in place --> sums, Picked -- answer --> gradients by Picked
-- gradient, in place --> gradient by the logits

"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.losses.classes import Picked, Question

_CPU_BLOCK = 1 << 19  # elements that stay in a core's cache from the first pass to the last
_TINY = 1e-30  # a sum of exponentials below this has lost its digits


class SharedSoftmax:
    """The questions of a chunk at one temperature, on exponentials that they share.

    exp(z / T - peak) takes the place of the logits; what a question leaves out of its logsumexp is
    set to 0 for a moment and summed again, so that no large number is subtracted from another.
    """

    def __init__(self, scores: Tensor, temperature: float, questions: Sequence[Question]) -> None:
        self._exps, self._temperature = scores, temperature
        self._questions = list(questions)
        self._grads: list[Picked] = []
        n = len(scores)
        self._picked = [scores.new_empty(q.ids.shape) for q in questions]
        self._means = [scores.new_empty(n) if q.mean else None for q in questions]
        self._masses = [scores.new_empty(n) for _ in questions]
        self._kept = [scores.new_empty(q.ids.shape) for q in questions]
        self._peak = scores.new_empty(n)
        for rows in self._blocks():
            self._exponentiate(rows)

    @property
    def is_lost(self) -> bool:
        """Whether some row's others are too small beside the peak to be told from nothing."""
        found = [mass.amin() for mass in self._masses if len(mass)]
        return bool(found) and not bool(torch.stack(found).amin() > _TINY)

    def _blocks(self) -> Iterator[slice]:
        rows, width = self._exps.shape
        step = rows if self._exps.device.type != "cpu" else max(1, _CPU_BLOCK // width)
        for start in range(0, rows, max(1, step)):
            yield slice(start, min(start + step, rows))

    def _exponentiate(self, rows: slice) -> None:
        exps, temperature = self._exps[rows], self._temperature
        if temperature != 1.0:
            exps.div_(temperature)
        for question, picked, mean in zip(self._questions, self._picked, self._means, strict=True):
            torch.gather(exps, 1, question.ids[rows], out=picked[rows])
            if mean is not None:
                mean[rows] = exps[:, :-1].mean(dim=1)
        peak = exps.amax(dim=1, keepdim=True)
        peak.masked_fill_(peak == -torch.inf, 0.0)
        exps.sub_(peak).exp_()
        self._peak[rows] = peak[:, 0]
        whole = None
        for question, mass, kept in zip(self._questions, self._masses, self._kept, strict=True):
            if question.exclude:
                ids = question.ids[rows]
                torch.gather(exps, 1, ids, out=kept[rows])
                exps.scatter_(1, ids, 0.0)
                torch.sum(exps, dim=1, out=mass[rows])
                exps.scatter_(1, ids, kept[rows])
            else:
                whole = exps.sum(dim=1) if whole is None else whole
                mass[rows] = whole

    def answer(self, factors: Tensor, wants_gradient: bool) -> Tensor:
        """Sum each question's answer over the chunk, [Q]; keep the gradients by what was picked."""
        sums, self._grads = [], []
        for index, question in enumerate(self._questions):
            asked = [self._picked[index], self._masses[index].log() + self._peak]
            mean = self._means[index]
            leaves = asked if mean is None else [*asked, mean]
            with torch.set_grad_enabled(wants_gradient):
                for leaf in leaves:
                    leaf.requires_grad_(wants_gradient)
                total = question.answer(Picked(*leaves)).sum()
            sums.append(total.detach())
            if wants_gradient:
                scaled = factors[index].to(total)
                found = torch.autograd.grad(total, leaves, scaled, allow_unused=True)
                self._grads.append(Picked(*map(_or_zero, found, leaves)))
        return torch.stack(sums)

    def gradient(self) -> Tensor:
        """The gradient by the logits, [n, V + 1], in the buffer; its last column means nothing."""
        shares = [grad.others / mass for grad, mass in zip(self._grads, self._masses, strict=True)]
        for rows in self._blocks():
            self._differentiate(rows, [share[rows, None] for share in shares])
        return self._exps

    def _differentiate(self, rows: slice, shares: Sequence[Tensor]) -> None:
        exps = self._exps[rows]
        questions = list(zip(self._questions, shares, self._kept, self._grads, strict=True))
        left_out = [
            (q.ids[rows], share, kept[rows]) for q, share, kept, _ in questions if q.exclude
        ]
        plain = [share for q, share, _, _ in questions if not q.exclude]
        for ids, _, _ in left_out:
            exps.scatter_(1, ids, 0.0)
        exps.mul_(_total([share for _, share, _ in left_out] + plain))
        for ids, _, kept in left_out:
            # What one question leaves out belongs to the others that do not leave it out.
            share = torch.zeros_like(kept)
            for own in plain:
                share += own
            for other_ids, other, _ in left_out:
                if other_ids is not ids:
                    absent = (ids[:, :, None] != other_ids[:, None, :]).all(dim=2)
                    share += other * absent
            exps.scatter_(1, ids, kept * share)
        for question, _, _, grad in questions:
            exps.scatter_add_(1, question.ids[rows], grad.scores[rows])
            if grad.mean is not None:
                exps += grad.mean[rows, None] / (exps.shape[1] - 1)
        if self._temperature != 1.0:
            exps.div_(self._temperature)


def _or_zero(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if gradient is None else gradient


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
