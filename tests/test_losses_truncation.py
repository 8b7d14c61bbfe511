"""What cutting off a tail costs, on distributions that obey Zipf's law."""

import pytest
import torch
from loss_cases import make_targets, normal
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.tails import ask_bucket, ask_kept

KL = ForwardKL().of_ratio


def zipf_logits(classes: int, exponent: float = 1.0) -> Tensor:
    return -exponent * torch.arange(1, classes + 1, dtype=torch.float64).log()[None]


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum())


def pull_on_first(divergence: Tensor, student: Tensor) -> float:
    (grad,) = torch.autograd.grad(divergence.sum(), student)
    return float(grad[0, 0])


def test_renormalising_inflates_the_head_and_the_bucket_leaves_it_exact() -> None:
    """100,000 classes, 20 kept: the illustration of Sparse Logit Sampling (ACL 2025)."""
    teacher = zipf_logits(100_000)
    seen = make_targets(teacher, kept=20).at(1.0)
    assert seen.log_probs[0, 0].exp().item() == pytest.approx(0.08271, abs=5e-6)
    assert 1.0 - seen.tail_mass.item() == pytest.approx(0.29758, abs=5e-6)
    student = teacher.clone().requires_grad_()
    pull = pull_on_first(ask_kept(seen, KL).ask(student), student)
    assert pull == pytest.approx(0.08271 - 0.27795, abs=1e-5)
    assert pull_on_first(ask_bucket(seen, KL).ask(student), student) == pytest.approx(
        0.0, abs=1e-12
    )


def test_a_record_without_the_normaliser_of_a_temperature_cannot_be_brought_to_it() -> None:
    """Why an uncached temperature is refused: the tail widens by what nobody has written down."""
    classes, kept, temperature = 128_000, 64, 2.0
    teacher = zipf_logits(classes, exponent=1.2)
    student = teacher + 0.3 * normal(0, 1, classes)
    student[:, :kept] += 3.5
    log_q = (student / temperature).log_softmax(dim=1)
    true = kl((teacher / temperature).log_softmax(dim=1), log_q)

    targets = make_targets(teacher, kept, temperatures=(1.0, temperature))
    exact = ask_bucket(targets.at(temperature), KL, temperature).ask(student).item()
    assert 0.05 < true - 0.03 < exact < true

    at_one = targets.at(1.0)
    head = at_one.log_probs / temperature
    bucket = torch.cat([head, at_one.tail_mass.log()[:, None] / temperature], dim=1)
    student_rest = log_q[:, kept:].logsumexp(dim=1, keepdim=True)
    student_bucket = torch.cat([log_q[:, :kept], student_rest], dim=1)
    assert kl(bucket.log_softmax(dim=1), student_bucket) > true + 1.0
    assert kl(head.log_softmax(dim=1), log_q[:, :kept]) > true + 1.0

    only_one = make_targets(teacher, kept, temperatures=(1.0,))
    with pytest.raises(ConfigError, match=r"temperature 2: .* exact targets at 1 only"):
        only_one.at(temperature)
