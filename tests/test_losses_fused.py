"""The fused head gives the losses of the plain logits, their gradients too, and holds none."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import make_targets, normal
from torch import Tensor, nn

from pipeline.heads import OutputHead
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.classes import ClassLoss
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.fused import FusedHead
from pipeline.losses.labels import CrossEntropy
from pipeline.targets import UNLABELLED

LOSSES: list[ClassLoss] = [
    *(
        ForwardKL(tail=tail, temperature=temperature)
        for tail in ("bucket", "draws", "renormalise")
        for temperature in (1.0, 2.0)
    ),
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
]


def make_head(
    classes: int,
    width: int = 5,
    padding: int = 0,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> OutputHead:
    """A head whose weights learn."""
    weight = normal(1, classes + padding, width, scale=2.0, dtype=dtype).requires_grad_()
    own = normal(2, classes + padding, dtype=dtype).requires_grad_() if bias else None
    return OutputHead(weight, own, scale, soft_cap, classes)


def make_knowledge(positions: int, classes: int, kept: int, draws: int) -> Knowledge:
    """Targets and labels of random logits; every third position has no label."""
    targets = make_targets(normal(3, positions, classes, scale=2.0), kept, draws)
    labels = torch.arange(positions) * 5 % classes
    labels[::3] = UNLABELLED
    return Knowledge(replace(targets, label_ids=labels), labels)


def plain_sums(
    losses: Sequence[ClassLoss], hidden: Tensor, head: OutputHead, knowledge: Knowledge
) -> Tensor:
    """Each loss summed over its positions, from logits of all of them in one tensor."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    if head.soft_cap is not None:
        logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
    student = StudentOutputs(logits)
    return torch.stack(
        [loss.per_position(student, knowledge, nn.ModuleDict()).sum() for loss in losses]
    )


def assert_equal(
    losses: Sequence[ClassLoss], head: OutputHead, hidden: Tensor, knowledge: Knowledge
) -> None:
    """Values and gradients to 1e-10, relative to the largest."""
    factors = torch.linspace(0.3, 1.7, len(losses), dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None]
    wanted = plain_sums(losses, hidden, head, knowledge)
    expected = torch.autograd.grad((wanted * factors).sum(), leaves)
    total, sums = FusedHead(head).sum_terms(losses, hidden, knowledge, list(factors))
    found = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(sums, wanted.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        total.detach(), (wanted.detach() * factors).sum(), rtol=1e-10, atol=1e-10
    )
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda loss: str(loss.model_dump(exclude_defaults=True))
)
@pytest.mark.parametrize(
    "head",
    [
        make_head(11),
        make_head(11, padding=3, bias=True),
        make_head(11, scale=0.25, bias=True),
        make_head(11, soft_cap=3.0, scale=2.0),
    ],
    ids=["plain", "padded with bias", "scaled with bias", "capped"],
)
def test_every_loss_and_every_head_give_values_and_gradients_of_the_plain_logits(
    loss: ClassLoss, head: OutputHead
) -> None:
    hidden = normal(4, 9, 5).requires_grad_()
    assert_equal([loss], head, hidden, make_knowledge(9, 11, 4, 3))


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(st.sampled_from(LOSSES), min_size=1, max_size=4),
    positions=st.integers(0, 300),
    classes=st.integers(3, 40),
    width=st.integers(1, 6),
    data=st.data(),
)
def test_any_sum_of_losses_shares_one_pass(
    chosen: list[ClassLoss], positions: int, classes: int, width: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, classes - 1))
    head = make_head(classes, width, padding=data.draw(st.integers(0, 2)))
    hidden = normal(4, positions, width).requires_grad_()
    assert_equal(chosen, head, hidden, make_knowledge(positions, classes, kept, 2))
