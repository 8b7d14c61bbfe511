"""What of a student stays as it is, and when the rest begins to learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_worlds import OnStep, make_example, make_student, make_trainer, weights

from pipeline.errors import ConfigError
from pipeline.freezing import Freezing, Gradual, Unfreezing
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.student.parameters import levels_below_head

LOSSES = [ForwardKL(), HiddenMSE(layers={1: -1})]


def frozen_names(freezing: Freezing) -> set[str]:
    """What a tiny llama of two layers does not learn."""
    student = make_student()
    freezing.apply(student)
    return {name for name, p in student.named_parameters() if not p.requires_grad}


def names_of(*parts: str) -> set[str]:
    """Its parameters with one of these parts in their names."""
    names = [name for name, _ in make_student().named_parameters()]
    return {name for name in names if any(part in name for part in parts)}


def test_freezing_is_by_pattern() -> None:
    freezing = Freezing(patterns=["model.embed_tokens.*", "model.layers.0.*"])
    assert frozen_names(freezing) == names_of("embed", "layers.0.")
    with pytest.raises(ConfigError, match=r"'model.embed_token.\*' .* mean 'model.embed_tokens\*'"):
        Freezing(patterns=["model.embed_token.*"]).apply(make_student())


def test_the_top_layers_learn_with_what_stands_above_them() -> None:
    assert frozen_names(Freezing(top=0)) == names_of("embed", "layers.")
    assert frozen_names(Freezing(top=1)) == names_of("embed", "layers.0.")
    assert frozen_names(Freezing(top=2, patterns=["lm_head*"])) == names_of("embed", "lm_head")
    assert frozen_names(Freezing(top=3)) == set()


def test_a_student_that_learns_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze: leaves no parameter that learns"):
        Freezing(patterns=["*"]).apply(make_student())
    with pytest.raises(ConfigError, match="both top and gradual"):
        Freezing(top=1, gradual=Gradual())


def learn(folder: Path, gradual: Gradual | None, **settings: Any) -> list[set[int]]:
    """Twelve steps; the levels below the head whose weights each of them moved."""
    trainer: Any = None
    moved: list[set[int]] = []
    before: dict[str, torch.Tensor] = {}

    def compare(step: int) -> None:
        now = weights(trainer.model)
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert all(n in changed for n in now if "projection" in n or n.startswith("lm_head"))
        levels = levels_below_head(trainer.model)
        moved.append({levels[name] for name in changed})
        for level in moved[-1]:
            assert {n for n in now if levels[n] == level} <= changed
        before.update(now)

    trainer = make_trainer(
        folder,
        LOSSES,
        [make_example(number) for number in range(4)],
        callbacks=[OnStep(compare)],
        gradual=gradual,
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    before = weights(trainer.model)
    trainer.train()
    return moved


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_layers_learn_one_after_the_other_from_the_last_to_the_embeddings(
    tmp_path: Path, optim: str
) -> None:
    moved = learn(tmp_path, Gradual(until=0.5), optim=optim)
    # Three levels below the head in the first six of twelve steps: one more after every two.
    expected = [{0}] * 2 + [{0, 1}] * 2 + [{0, 1, 2}] * 2 + [{0, 1, 2, 3}] * 6
    assert moved == expected


def test_gradients_that_are_dropped_are_those_that_are_never_computed() -> None:
    """DDP waits for every gradient, so there they are computed; test_ranks has both in a run."""
    found = []
    for hold in (True, False):
        model = make_student()
        Freezing(patterns=["*layernorm*"]).apply(model)
        unfreezing = Unfreezing(model, Gradual(until=0.6), hold)
        steps = []
        for progress in (0.0, 0.2, 0.4, 0.6):
            model.zero_grad()
            unfreezing.advance(progress)
            model(torch.arange(5)[None]).logits.square().sum().backward()
            unfreezing.drop_gradients()
            steps.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        found.append(steps)
    held, dropped = found
    assert [len(step) for step in held] == [2, 9, 16, 17]
    for one, other in zip(held, dropped, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
