"""Short rows: entries with a logit of -inf are not there, for every loss on logits."""

from dataclasses import replace

import pytest
import torch
from loss_cases import all_losses, describe, make_case

from pipeline.losses import Loss
from pipeline.losses.numbers import NumberLoss
from pipeline.targets import SparseDistribution, Targets

LOSSES = [loss for loss in all_losses() if not isinstance(loss, NumberLoss) and loss.reads_teacher]


def pad(targets: Targets) -> Targets:
    """The same with two more ids in every row, which the row does not hold."""
    held = torch.zeros(len(targets), targets.num_classes).scatter(1, targets.ids, 1.0)
    others = held.argsort(dim=1, stable=True)[:, :2]
    nothing = targets.logits.new_full(others.shape, -torch.inf)
    return replace(
        targets,
        ids=torch.cat([targets.ids, others], dim=1),
        logits=torch.cat([targets.logits, nothing], dim=1),
    )


@pytest.mark.parametrize("loss", LOSSES, ids=describe)
def test_padding_of_a_short_row_changes_no_value_and_no_gradient(loss: Loss) -> None:
    case = make_case(loss)
    assert case.knowledge.targets is not None
    padded = replace(case.knowledge, targets=pad(case.knowledge.targets))
    short = replace(case, knowledge=padded)
    torch.testing.assert_close(short.values(), case.values())
    for name, gradient in case.gradients().items():
        torch.testing.assert_close(short.gradients()[name], gradient, msg=name)


def test_a_distribution_gives_padding_no_mass_and_no_entropy() -> None:
    targets = make_case(LOSSES[0]).knowledge.targets
    assert targets is not None
    for temperature in targets.temperatures:
        whole, short = targets.at(temperature), pad(targets).at(temperature)
        assert isinstance(short, SparseDistribution)
        assert (short.log_probs[:, -2:] == -torch.inf).all()
        torch.testing.assert_close(short.tail_mass, whole.tail_mass)
        torch.testing.assert_close(short.entropy(), whole.entropy())
