"""The fused head gives the losses of the plain logits, their gradients too, and holds none."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import all_losses, describe, make_targets, normal
from small_worlds import TASK, V, make_example, make_student, make_trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.heads import OutputHead
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.classes import ClassLoss
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.fused import FusedHead
from pipeline.losses.labels import CrossEntropy
from pipeline.targets import UNLABELLED
from pipeline.terms import fuse_head, weigh_terms

LOSSES = [loss for loss in all_losses() if isinstance(loss, ClassLoss)]


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


@pytest.mark.parametrize("loss", LOSSES, ids=describe)
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


@pytest.mark.parametrize("gap", [0.0, 40.0, 200.0, 800.0])
def test_a_student_that_is_sure_keeps_its_last_digits(gap: float) -> None:
    """The mass beside the kept classes may be e^-gap of the whole."""
    knowledge = make_knowledge(6, 11, 4, 3)
    weight = torch.zeros(11, 6, dtype=torch.float64)
    hidden = torch.eye(6, dtype=torch.float64).requires_grad_()
    for row, ids in enumerate(knowledge.targets.ids):
        weight[ids, row] = gap
    head = OutputHead((weight + 0.1 * normal(5, 11, 6)).requires_grad_(), None, 1.0, None, 11)
    assert_equal([ForwardKL(tail="bucket"), CrossEntropy()], head, hidden, knowledge)


def test_single_precision_agrees_with_double_to_its_own_digits() -> None:
    knowledge = make_knowledge(40, 300, 16, 3)
    factors = [torch.tensor(0.02), torch.tensor(0.01)]
    found = []
    for dtype in (torch.float32, torch.float64):
        head = make_head(300, 8, dtype=dtype)
        hidden = normal(4, 40, 8, dtype=dtype).requires_grad_()
        total, _ = FusedHead(head).sum_terms(
            [LOSSES[0], CrossEntropy()], hidden, knowledge, factors
        )
        found.append([total.detach(), *torch.autograd.grad(total, [hidden, head.weight])])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_autocast_multiplies_in_bfloat16_and_sums_in_single_precision() -> None:
    knowledge = make_knowledge(40, 300, 16, 3)
    head = make_head(300, 8, dtype=torch.float32)
    hidden = normal(4, 40, 8, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, sums = FusedHead(head).sum_terms(
            [CrossEntropy()], hidden, knowledge, [torch.tensor(1.0)]
        )
    rounded = nn.functional.linear(hidden.bfloat16(), head.weight.bfloat16()).float()
    labelled = knowledge.label_ids != UNLABELLED
    wanted = nn.functional.cross_entropy(
        rounded[labelled], knowledge.label_ids[labelled], reduction="sum"
    )
    assert sums.dtype == torch.float32
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(wanted, [hidden, head.weight])
    for mine, plain in zip(
        torch.autograd.grad(total, [hidden, head.weight]), expected, strict=True
    ):
        assert mine.dtype == torch.float32
        assert float((mine - plain).abs().max()) < 0.01 * float(plain.abs().max())


def test_a_bfloat16_head_gets_gradients_of_its_own_dtype() -> None:
    knowledge = make_knowledge(12, 30, 4, 3)
    head = make_head(30, 8, bias=True, dtype=torch.bfloat16)
    hidden = normal(4, 12, 8, dtype=torch.bfloat16).requires_grad_()
    total, _ = FusedHead(head).sum_terms([CrossEntropy()], hidden, knowledge, [torch.tensor(1.0)])
    found = torch.autograd.grad(total, [hidden, head.weight, head.bias])
    assert total.dtype == torch.float32
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}


def test_a_frozen_head_still_teaches_the_hidden_states() -> None:
    knowledge = make_knowledge(12, 30, 4, 3)
    head = make_head(30)
    hidden = normal(4, 12, 5).requires_grad_()
    factor = [torch.tensor(1.0, dtype=torch.float64)]
    free, _ = FusedHead(head).sum_terms([CrossEntropy()], hidden, knowledge, factor)
    expected = torch.autograd.grad(free, hidden)[0]
    head.weight.requires_grad_(False)
    frozen, _ = FusedHead(head).sum_terms([CrossEntropy()], hidden, knowledge, factor)
    frozen.backward()
    assert head.weight.grad is None
    torch.testing.assert_close(hidden.grad, expected)


def test_a_factor_from_outside_scales_every_gradient() -> None:
    knowledge = make_knowledge(12, 30, 4, 3)
    head = make_head(30)
    hidden = normal(4, 12, 5).requires_grad_()
    factor = [torch.tensor(1.0, dtype=torch.float64)]
    found = []
    for scale in (1.0, 4.0):
        total, _ = FusedHead(head).sum_terms([CrossEntropy()], hidden, knowledge, factor)
        found.append(torch.autograd.grad(scale * total, [hidden, head.weight]))
    for once, fourfold in zip(*found, strict=True):
        torch.testing.assert_close(4.0 * once, fourfold)


class _Largest(TorchDispatchMode):
    """Remember the largest tensor of at least two dimensions that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return result


def test_no_tensor_of_all_positions_and_classes_is_made() -> None:
    positions, classes = 1024, 9000
    knowledge = make_knowledge(positions, classes, 8, 0)
    head = make_head(classes, 2, dtype=torch.float32)
    hidden = normal(4, positions, 2, dtype=torch.float32).requires_grad_()
    factors = [torch.tensor(1.0)] * 2
    with _Largest() as largest:
        total, _ = FusedHead(head).sum_terms(
            [ForwardKL(tail="bucket"), CrossEntropy()], hidden, knowledge, factors
        )
        total.backward()
    assert 0 < largest.elements < 4 * positions * classes / 2


def test_a_head_that_is_no_linear_map_keeps_its_logits_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_student()
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda module, given, logits: logits + logits.mean())
    with caplog.at_level(logging.WARNING):
        assert fuse_head(model, 40) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the logits of every position are computed" in caplog.text


def test_training_gives_the_model_no_position_to_make_logits_of(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(4)]
    trainer = make_trainer(tmp_path, [ForwardKL(), CrossEntropy()], examples)
    batch = trainer.data_collator(examples)
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[1] == 0
    kept = trainer.model(**batch["inputs"]).logits
    assert kept.shape[1] == batch["inputs"]["input_ids"].shape[1]


def test_a_compiled_student_keeps_its_logits(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(4)]
    losses = [ForwardKL(), CrossEntropy()]
    fused, plain = (
        make_trainer(tmp_path / name, losses, examples, torch_compile=compiled)
        for name, compiled in (("fused", False), ("plain", True))
    )
    batch = plain.data_collator(examples)
    total, outputs = plain.compute_loss(plain.model, batch, return_outputs=True)
    assert outputs.logits.shape[1] == batch["inputs"]["input_ids"].shape[1]
    assert float(total.detach()) == pytest.approx(
        float(fused.compute_loss(fused.model, batch).detach()), rel=1e-5
    )


def test_a_student_under_autocast_is_fused_as_its_logits_would_be_computed(tmp_path: Path) -> None:
    """accelerate turns autocast on inside of the model's forward pass only."""
    examples = [make_example(number) for number in range(4)]
    losses = [ForwardKL(temperature=2.0), CrossEntropy()]
    trainer = make_trainer(tmp_path, losses, examples, bf16=True, max_steps=1)
    trainer.train()
    batch = trainer.data_collator(examples)
    factors = [torch.tensor(0.5), torch.tensor(0.1)]
    fused = fuse_head(trainer.model, V)
    assert fused is not None
    found = []
    for head in (fused, None):
        total, sums, _ = weigh_terms(trainer.model, batch, losses, factors, head, TASK)
        gradients = torch.autograd.grad(total, list(trainer.model.parameters()))
        found.append([total.detach(), sums, *gradients])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)
