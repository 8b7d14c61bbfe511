"""Cross-entropy against PyTorch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import PADDED, V, make_targets, normal
from torch import nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.labels import CrossEntropy
from pipeline.targets import UNLABELLED


@given(
    st.lists(st.sampled_from([UNLABELLED, *range(V)]), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.1, 0.7]),
    st.integers(0, 1000),
)
def test_it_is_the_usual_cross_entropy_over_the_classes_of_the_cache(
    labels: list[int], smoothing: float, seed: int
) -> None:
    logits = normal(seed, len(labels), PADDED, scale=5.0).requires_grad_()
    label_ids = torch.tensor(labels)
    knowledge = Knowledge(make_targets(normal(seed, len(labels), V), kept=2), label_ids)
    loss = CrossEntropy(label_smoothing=smoothing)
    found = loss.per_position(StudentOutputs(logits), knowledge, nn.ModuleDict())
    expected = functional.cross_entropy(
        logits[:, :V], label_ids, reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), logits)
    )


def test_without_a_cache_every_class_of_the_head_counts() -> None:
    logits, label_ids = normal(0, 3, PADDED), torch.tensor([0, PADDED - 1, 4])
    found = CrossEntropy().per_position(
        StudentOutputs(logits), Knowledge(None, label_ids), nn.ModuleDict()
    )
    expected = functional.cross_entropy(logits, label_ids, reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_single_precision(dtype: torch.dtype) -> None:
    logits = normal(0, 4, V, scale=5.0, dtype=dtype).requires_grad_()
    knowledge = Knowledge(None, torch.tensor([0, 1, UNLABELLED, 3]))
    found = CrossEntropy().per_position(StudentOutputs(logits), knowledge, nn.ModuleDict())
    expected = functional.cross_entropy(logits.float(), knowledge.label_ids, reduction="none")
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.dtype == dtype
    assert torch.count_nonzero(grad[2]) == 0


def test_a_sure_and_right_student_keeps_its_last_digits() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]])
    knowledge = Knowledge(None, torch.tensor([0]))
    found = CrossEntropy().per_position(StudentOutputs(logits), knowledge, nn.ModuleDict())
    torch.testing.assert_close(found.double().log(), torch.tensor([2.0]).double().log() - 60.0)


def test_a_student_that_rules_out_all_but_the_label_is_done() -> None:
    logits = torch.tensor([[-torch.inf, 3.0, -torch.inf]], requires_grad=True)
    knowledge = Knowledge(None, torch.tensor([1]))
    found = CrossEntropy().per_position(StudentOutputs(logits), knowledge, nn.ModuleDict())
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert found.tolist() == [0.0]
    assert grad.tolist() == [[0.0, 0.0, 0.0]]


@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=8), st.integers(0, 1000))
def test_class_weights_give_the_weighted_mean_of_pytorch(labels: list[int], seed: int) -> None:
    logits, label_ids = normal(seed, len(labels) + 1, V), torch.tensor([*labels, UNLABELLED])
    weights = torch.ones(V, dtype=torch.float64)
    weights[2], weights[5] = 4.0, 0.25
    loss = CrossEntropy(class_weights={2: 4.0, 5: 0.25})
    knowledge = Knowledge(None, label_ids)
    values = loss.per_position(StudentOutputs(logits), knowledge, nn.ModuleDict())
    counted = loss.weights(knowledge)
    assert counted is not None
    expected = functional.cross_entropy(logits, label_ids, weight=weights)
    torch.testing.assert_close(values.sum() / counted.sum(), expected)


def test_classes_are_weighted_by_name_or_id() -> None:
    loss = CrossEntropy(class_weights={"sports": 2.0, 0: 3.0, "2": 4.0})
    named = loss.name_classes(["travel", "sports", "health"])
    assert named.class_weights == {1: 2.0, 0: 3.0, 2: 4.0}
    assert CrossEntropy(class_weights={"7": 2.0}).name_classes(None).class_weights == {7: 2.0}


@pytest.mark.parametrize(
    ("key", "names", "message"),
    [
        ("sprts", ["travel", "sports"], "'sprts' is no class; did you mean 'sports'"),
        (2, ["travel", "sports"], "2 is no class; choose from sports, travel"),
        ("sports", None, "'sports' is no class; the classes have no names, use ids"),
    ],
)
def test_a_class_that_does_not_exist_is_refused(
    key: int | str, names: list[str] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CrossEntropy(class_weights={key: 2.0}).name_classes(names)
