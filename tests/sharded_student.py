"""A student trained for two optimizer steps by processes that shard it; see test_ranks.py.

layouts -> two steps each -> gradients of the whole weights and loss of each step, in one file
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_worlds import make_example, make_student, make_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from pipeline.losses import Loss
from pipeline.losses.attention import MiniLM
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.losses.labels import CrossEntropy
from pipeline.losses.weighting import PositionWeights
from pipeline.trainer import DistillationTrainer

STEPS, MICRO_BATCHES, EXAMPLES = 2, 2, 8
LAYOUTS = ("root", "parts", "bent", "half", "flat")


@dataclass(frozen=True)
class Trained:
    """What two steps gave: gradients by name and the loss, and what was said of the head."""

    steps: list[dict[str, Tensor]]
    fused: bool
    said: list[str]


def train(folder: Path, layout: str, tied: bool) -> Trained:
    """Two steps of a student, each rank with its share of every batch.

    Args:
        layout: of `shard`; "flat" learns from no hidden states, "whole" shards nothing and "whole
            flat" does neither.
    """
    certain = PositionWeights(weight="certainty")
    losses: list[Loss] = [ForwardKL(temperature=2.0, positions=certain), CrossEntropy()]
    if "flat" not in layout:
        losses += [HiddenMSE(layers={1: 1}), MiniLM(relation_heads=2)]
    student = make_student(tie_word_embeddings=tied)
    trainer = make_trainer(folder, losses, [make_example(0)], student)
    model = shard(trainer.model, layout)
    said = _Said()
    logging.getLogger("pipeline").addHandler(said)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for step in range(STEPS):
        loss = _run_step(trainer, model, step)
        steps.append({**_gather(model), "loss": loss})
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("pipeline").removeHandler(said)
    assert trainer._fused is not None
    return Trained(steps, next(iter(trainer._fused.values())) is not None, said.lines)


def shard(model: Any, layout: str) -> nn.Module:
    """Give each rank its part of the weights.

    Args:
        layout: "root": every layer by itself and the rest together; "parts": embeddings, norm and
            head by themselves too, freed after use; "bent": as root, with a head that is no linear
            map; "half": as root, computed in bfloat16; "flat": by FSDP1; otherwise not at all.
    """
    if layout == "flat":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if layout.startswith("whole"):
        return model
    settings: dict[str, Any] = {}
    if layout == "half":
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if layout == "bent":  # by what no softmax sees
        model.lm_head.register_forward_hook(lambda _, given, x: x + x.mean(-1, keepdim=True))
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    if layout == "parts":
        embedding, norm, head = model.model.embed_tokens, model.model.norm, model.lm_head
        tied = embedding.weight is head.weight
        for part in [[embedding, norm, head]] if tied else [embedding, norm, head]:
            fully_shard(part, reshard_after_forward=True)
    fully_shard(model, **settings)
    return model


def _run_step(trainer: DistillationTrainer, model: nn.Module, step: int) -> Tensor:
    """Gradients of one step, and its loss over all ranks."""
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    rows = range(step * EXAMPLES + rank, (step + 1) * EXAMPLES, ranks)
    mine = [make_example(row) for row in rows]
    micro = [trainer.data_collator(mine[i::MICRO_BATCHES]) for i in range(MICRO_BATCHES)]
    batches, counts = trainer.get_batch_samples(iter(micro), MICRO_BATCHES, torch.device("cpu"))
    loss = torch.zeros(())
    for batch in batches:
        total = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        total.backward()
        loss += total.detach() / ranks
    if ranks > 1:
        dist.all_reduce(loss)
    return loss


def _gather(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, on every rank."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return _gather(model.module)
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def leave() -> None:
    """End this rank once all are there. Gloo's threads may outlive the interpreter, and abort it:
    "terminate called without an active exception"."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {
        f"{layout} {tied}": vars(train(folder, layout, tied == "tied"))
        for layout in LAYOUTS
        for tied in ("tied", "untied")
    }
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    leave()
