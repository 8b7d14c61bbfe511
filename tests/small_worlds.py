"""Tiny students, and a teacher of random logits over what they read, all in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss_cases import CONFIGS, make_head
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from pipeline.accounts import Marks
from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.batches import Collator, Selection
from pipeline.curve import Curve
from pipeline.examples import CachedExample
from pipeline.freezing import Gradual
from pipeline.lockstep import Seat
from pipeline.losses import LOSSES, Loss
from pipeline.losses.numbers import NumberLoss
from pipeline.losses.weighting import LogitLoss
from pipeline.optimizing import LearningRates
from pipeline.targets import UNLABELLED
from pipeline.tasks.causal_lm import CausalLM
from pipeline.teacher.sparse import sparse_targets
from pipeline.terms import attach_projections
from pipeline.trainer import DistillationTrainer

V, TEACHER_WIDTH = 40, 6
TEMPERATURES = (1.0, 2.0, 4.0)
HEADS = {f"{part}.{layer}": 2 for part in ("query", "key", "value") for layer in (1, -1)}
LAYERS = ("layer.0", "layer.1", "layer.2", "layer.-1")
SIGNALS = {name: name for name in (*LAYERS, "pooled", "head", *HEADS)}
WIDTHS = dict.fromkeys(SIGNALS, TEACHER_WIDTH)
TASK = CausalLM(block_size=16)


def every_loss() -> list[Loss]:
    """Every member that a language model can learn by, in each of its configurations; those on
    logits in their last."""
    found = [
        member.model_validate({"name": name, **config}).hear(
            lambda: make_head(V, TEACHER_WIDTH, torch.float32)
        )
        for name, member in LOSSES.items()
        if not issubclass(member, NumberLoss)
        for config in CONFIGS.get(name, [{}])
    ]
    last = {loss.name: loss for loss in found}
    return [loss for loss in found if not isinstance(loss, LogitLoss) or loss is last[loss.name]]


def name_loss(loss: Loss) -> str:
    """A name for the list of tests."""
    return " ".join(f"{value}" for value in loss.model_dump(exclude_defaults=True).values())


def make_example(
    number: int, top_k: int = 8, tail_draws: int = 3, targets: int | None = None
) -> CachedExample:
    """Example `number`: 4 to 12 tokens whose first ones are prompt, and every fifth unlabelled."""
    generator = torch.Generator().manual_seed(number)
    rng = np.random.default_rng(number)
    tokens = int(rng.integers(4, 13))
    ids = rng.integers(0, V, tokens).astype(np.int32)
    count = int(rng.integers(1, tokens)) if targets is None else targets
    positions = np.arange(tokens - 1 - count, tokens - 1, dtype=np.int32)
    labels = ids[positions + 1].copy()
    labels[4::5] = UNLABELLED
    logits = torch.randn(count, V, generator=generator) * 2
    hidden = {
        name: torch.randn(1 if name == "pooled" else count, TEACHER_WIDTH, generator=generator)
        for name in SIGNALS
    }
    return CachedExample(
        example_id=f"example {number}",
        input_ids=ids,
        segment_lengths=np.array([tokens], dtype=np.int32),
        target_positions=positions,
        label_ids=labels,
        columns={"split": "train"},
        targets=sparse_targets(
            logits,
            top_k,
            tail_draws,
            TEMPERATURES,
            torch.from_numpy(labels.astype(np.int64)),
            generator,
        ),
        hidden=hidden,
    )


def ask(model: nn.Module, example: CachedExample, top_k: int = V) -> CachedExample:
    """The example with what a live teacher says about it, no target left out."""
    positions = np.arange(len(example.input_ids) - 1, dtype=np.int32)
    labels = example.input_ids[1:]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(example.input_ids).long()[None]).logits[0, :-1]
    label_ids = torch.from_numpy(labels.astype(np.int64))
    targets = sparse_targets(logits[:, :V], top_k, 0, TEMPERATURES, label_ids)
    return replace(
        example, target_positions=positions, label_ids=labels, targets=targets, hidden={}
    )


def make_student(**changes: Any) -> LlamaForCausalLM:
    """Two layers of width 16 and a head with two rows of padding, always the same."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": V + 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def make_trainer(
    folder: Path,
    losses: Sequence[Loss],
    examples: Sequence[CachedExample],
    model: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    learning_rates: LearningRates | None = None,
    seat: Seat | None = None,
    marks: Marks | None = None,
    gradual: Gradual | None = None,
    **training: Any,
) -> DistillationTrainer:
    """The real trainer over examples in memory, with plain gradient descent."""
    model = make_student() if model is None else model
    torch.manual_seed(1)
    attach_projections(model, losses, WIDTHS)
    settings: Mapping[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        **training,
    }
    return DistillationTrainer(
        model,
        losses,
        Selection(examples),
        Collator(TASK, 0, SIGNALS, HEADS, marks=marks),
        training_arguments(settings, EvaluationConfig(), folder),
        curve=Curve(folder / "metrics.jsonl"),
        learning_rates=learning_rates,
        seat=seat,
        gradual=gradual,
        callbacks=callbacks,
    )


class KeepGradients(TrainerCallback):
    """The gradient of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        self.steps.append(gradients(model))


class OnStep(TrainerCallback):
    """Call a function after every optimizer step."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call(state.global_step)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a model by name, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], limit: float) -> None:
    """Each tensor within `limit` of the size of the largest one, in the Euclidean norm."""
    assert found.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        distance = float((found[name] - value).norm())
        assert distance <= limit * max(float(value.norm()), 1e-3 * scale), name
