"""Forward KL from sparse targets: its tails, what it refuses, its precision and its memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PADDED, V, make_targets, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import ConfigError, ModelError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.divergences import ForwardKL, Tail
from pipeline.targets import Targets

temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
seeds = st.integers(0, 10_000)


def kl_of(
    logits: Tensor, targets: Targets, temperature: float = 1.0, tail: Tail = "auto"
) -> Tensor:
    loss = ForwardKL(temperature=temperature, tail=tail)
    knowledge = Knowledge(targets, targets.label_ids)
    return loss.per_position(StudentOutputs(logits), knowledge, nn.ModuleDict())


def gradient(values: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return grad


@temperatures
@given(seed=seeds)
@settings(max_examples=20)
def test_the_temperature_factor_scales_the_gradient_and_not_only_the_value(
    temperature: float, seed: int
) -> None:
    """The value that is printed and the gradient that is followed are of one function."""
    targets = make_targets(normal(seed, 1, V), kept=3)
    student, direction = normal(seed + 1, 1, V).requires_grad_(), normal(seed + 2, 1, V)
    step = 1e-5 * direction
    rise = kl_of(student + step, targets, temperature) - kl_of(student - step, targets, temperature)
    slope = (gradient(kl_of(student, targets, temperature), student) * direction).sum()
    torch.testing.assert_close(rise.sum().detach() / 2e-5, slope, rtol=1e-5, atol=1e-7)


def test_auto_takes_draws_where_there_are_some_and_the_bucket_elsewhere() -> None:
    teacher, student = normal(0, 4, V), normal(1, 4, V)
    with_draws, without = make_targets(teacher, 3, draws=2), make_targets(teacher, 3)
    assert torch.equal(kl_of(student, with_draws), kl_of(student, with_draws, tail="draws"))
    assert torch.equal(kl_of(student, without), kl_of(student, with_draws, tail="bucket"))
    assert not torch.allclose(kl_of(student, with_draws), kl_of(student, without))


def test_draws_that_were_not_cached_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tail: draws, but the cache holds no draws; use tail"):
        kl_of(normal(0, 2, V), make_targets(normal(1, 2, V), 3), tail="draws")


def test_a_temperature_that_was_not_cached_is_refused_with_those_that_were() -> None:
    with pytest.raises(ConfigError, match=r"temperature 3: the cache holds .* at 1, 2, 4 only"):
        kl_of(normal(0, 2, V), make_targets(normal(1, 2, V), 3), temperature=3.0)


def test_a_model_without_a_teacher_is_told_so() -> None:
    with pytest.raises(ConfigError, match="targets are needed, found none; give a cache"):
        ForwardKL().per_position(
            StudentOutputs(normal(0, 2, V)), Knowledge(None, torch.zeros(2)), nn.ModuleDict()
        )


def test_a_head_that_lacks_classes_is_refused() -> None:
    with pytest.raises(ModelError, match="its head has 6 classes, the targets 7; use a student"):
        kl_of(normal(0, 2, V - 1), make_targets(normal(1, 2, V), 3))


@pytest.mark.parametrize("tail", ["bucket", "draws", "renormalise"])
@pytest.mark.parametrize("kept", [0, 2])
def test_padding_of_a_short_row_is_no_entry(tail: Tail, kept: int) -> None:
    targets = make_targets(normal(0, 3, V, scale=2.0), kept, draws=3)
    padded = Targets(
        **{
            **vars(targets),
            "ids": torch.cat([targets.ids, torch.zeros(3, 2, dtype=torch.int64)], dim=1),
            "logits": torch.cat([targets.logits, torch.full((3, 2), -torch.inf)], dim=1),
        }
    )
    student = normal(1, 3, PADDED).requires_grad_()
    found, expected = kl_of(student, padded, tail=tail), kl_of(student, targets, tail=tail)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student))


@pytest.mark.parametrize("gap", [-2e4, -60.0, 60.0, 2e4])
def test_the_bucket_is_accurate_however_little_the_student_puts_on_either_side(gap: float) -> None:
    """In float32, 1 - sum_S q is 0 or 1 long before the true logarithm stops to matter."""
    teacher = normal(0, 3, V)
    targets = make_targets(teacher, 3)
    student = normal(1, 3, V).scatter_add(1, targets.ids, torch.full_like(teacher, gap))
    kept = torch.zeros_like(teacher).scatter(1, targets.ids, 1.0).bool()
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    head = torch.where(kept, log_p.exp() * (log_p - log_q), 0.0).sum(1)
    log_m, log_rest = (x.masked_fill(kept, -torch.inf).logsumexp(1) for x in (log_p, log_q))
    expected = head + log_m.exp() * (log_m - log_rest)
    single = student.float().requires_grad_()
    found = kl_of(single, targets, tail="bucket")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert gradient(found, single).isfinite().all()


def test_a_student_that_rules_out_all_that_was_not_kept_is_infinitely_far_but_not_nan() -> None:
    targets = make_targets(normal(0, 3, V), 3)
    student = torch.full((3, V), -torch.inf, dtype=torch.float64)
    student = student.scatter(1, targets.ids, 1.0).requires_grad_()
    found = kl_of(student, targets, tail="bucket")
    assert found.tolist() == [torch.inf] * 3
    assert not gradient(found, student).isnan().any()


def test_half_precision_logits_are_computed_in_single_precision() -> None:
    targets = make_targets(normal(0, 4, V, dtype=torch.float32), 3)
    student = normal(1, 4, PADDED, dtype=torch.bfloat16).requires_grad_()
    single = student.detach().float().requires_grad_()
    found, expected = kl_of(student, targets), kl_of(single, targets)
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient(found, student), gradient(expected, single).bfloat16())


class SheetCounter(TorchDispatchMode):
    """Counts the new tensors that are as large as the logits."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.storages: set[int] = set()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= 4 * self.elements:
            self.kept.append(out)  # alive, so that no address is used twice
            self.storages.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("tail", ["bucket", "draws", "renormalise"])
def test_no_sheet_as_large_as_the_logits_is_made_beside_their_gradient(tail: Tail) -> None:
    rows, classes = 40, 40_000
    teacher = normal(0, rows, classes, scale=3.0, dtype=torch.float32)
    targets = make_targets(teacher, 8, draws=4)
    student = normal(1, rows, classes, dtype=torch.float32).requires_grad_()
    with SheetCounter(student.numel()) as counter:
        gradient(kl_of(student, targets, temperature=2.0, tail=tail), student)
    made = counter.storages - {student.untyped_storage().data_ptr()}
    assert len(made) == 1
