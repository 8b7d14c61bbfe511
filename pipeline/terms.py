"""The terms of a student's loss on one batch, and their weighted sum.

model + batch -> run_student -> StudentOutputs -> each loss, one value per position -> its sum
model + batch -> hidden states at the targets -> FusedHead -> the same sums, without logits
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.accounts import Ledger
from pipeline.batches import COUNTED
from pipeline.errors import ModelError, NumericalError
from pipeline.heads import OutputHead
from pipeline.losses.base import Knowledge, Loss, StudentOutputs
from pipeline.losses.classes import Asking, ClassLoss
from pipeline.losses.fused import FusedHead
from pipeline.outputs import read_knowledge, run_student, unwrap
from pipeline.sentences import pooled_width
from pipeline.tasks.base import Task

PROJECTIONS = "distillation_projections"  # the attribute that holds the losses' parameters


def attach_projections(
    model: PreTrainedModel, losses: Sequence[Loss], teacher_widths: Mapping[str, int]
) -> None:
    """Give the student the learned parameters of its losses, so that they train and checkpoint.

    Args:
        teacher_widths: by signal; "<teacher>/<signal>" for further teachers.
    """
    hidden, pooled = int(getattr(model.config, "hidden_size", 0)), pooled_width(model)
    modules = nn.ModuleDict()
    for index, loss in enumerate(losses):
        mine, theirs = next(iter(loss.compares.items()), ("", ""))  # all of a loss are as wide
        width = pooled if mine == "pooled" else hidden
        if loss.teacher is not None:
            theirs = f"{loss.teacher}/{theirs}"
        modules[str(index)] = loss.projections(width, teacher_widths.get(theirs, 0))
    model.add_module(PROJECTIONS, modules)


def carry_projections(
    before: nn.ModuleDict, had: Sequence[Loss], model: PreTrainedModel, losses: Sequence[Loss]
) -> None:
    """Let the projections of losses that were there before go on, whatever their weights.

    Args:
        before: the projections of the losses `had`.
        model: with new ones of `losses`.
    """
    known = {loss.model_dump_json(exclude={"weight"}): before[str(i)] for i, loss in enumerate(had)}
    for index, loss in enumerate(losses):
        same = known.get(loss.model_dump_json(exclude={"weight"}))
        if same is not None:
            projections_of(model)[str(index)].load_state_dict(same.state_dict())


def projections_of(model: nn.Module) -> nn.ModuleDict:
    """The module `attach_projections` added, under any wrapper."""
    found = getattr(unwrap(model), PROJECTIONS)
    assert isinstance(found, nn.ModuleDict)
    return found


def find_head(model: nn.Module, num_classes: int | None) -> OutputHead | None:
    """The student's output head by itself, its weights those that learn; None if it has none.

    Args:
        model: the student, under any wrapper.
        num_classes: V of the cache; None for every row of the head.

    Raises:
        ModelError: its logits are more than a scaled and capped linear map, or its weights are
            sharded.
    """
    if _is_gathered(model):  # whole in the forward pass only
        raise _sharded(model)
    return _find_head(model, num_classes)


def fuse_head(model: nn.Module, num_classes: int | None) -> FusedHead | None:
    """The student's output head fused with the losses, or None where whole logits are needed.

    A head that FSDP2 (`fully_shard`) shards can be fused, because `weigh_terms` uses it in the
    forward pass. Why whole logits are needed is logged in one line.
    """
    try:
        head = _find_head(model, num_classes)
    except ModelError as error:
        logging.getLogger(__name__).warning(
            "student: the logits of every position are computed in one piece (%s)", error
        )
        return None
    return None if head is None else FusedHead(head)


def weigh_terms(
    model: nn.Module,
    batch: Mapping[str, Any],
    losses: Sequence[Loss],
    factors: Sequence[Tensor],
    fused: FusedHead | None,
    task: Task,
    ledger: Ledger | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """Run the student and sum its losses.

    Args:
        task: knows where in the student's outputs its logits and hidden states are.
        factors: of each loss in the total: its weight over what it is normalised by.
        fused: of `fuse_head`.
        ledger: takes every value.

    Returns:
        The weighted total, each loss's own sum over its valid units ([L], without gradient), and
        what the model returned (logits of no position where the head is fused).
    """
    classes = [index for index, loss in enumerate(losses) if isinstance(loss, ClassLoss)]
    if fused is None or not classes or any(loss.needs_all_logits for loss in losses):
        outputs, student = run_student(model, batch, losses, task)
        sums = torch.stack(sum_terms(losses, student, batch, projections_of(model), ledger))
        total = (sums * torch.stack([f.to(sums) for f in factors])).sum()
        if not classes and student.logits.requires_grad:
            total = total + 0.0 * student.logits.sum()  # DDP waits for every weight's gradient
        return total, sums.detach(), outputs
    knowledge = read_knowledge(batch)
    terms: list[Asking] = [loss for loss in losses if isinstance(loss, ClassLoss)]
    if ledger is not None:
        index = batch["target_index"]
        terms = [ledger.wrap(i, loss, index) for i, loss in zip(classes, terms, strict=True)]
    with _sum_in_head(
        model, batch["target_index"], fused, terms, knowledge, [factors[index] for index in classes]
    ) as answers:
        outputs, student = run_student(model, batch, losses, task)
    total, found = answers[0]
    total = total + outputs.logits.sum()  # zero, of no position
    sums = found.new_zeros(len(losses))
    sums[classes] = found
    projections = projections_of(model)
    for index, loss in enumerate(losses):
        if index not in classes:
            value = _sum(index, loss, student, knowledge, projections, ledger)
            sums[index] = value.detach()
            total = total + value * factors[index].to(value)
    return total, sums, outputs


def check_finite(total: Tensor, sums: Tensor, names: Sequence[str], step: int) -> None:
    """Refuse a total that nothing can be learned from; `sums` [L] are those of the named losses.

    Raises:
        NumericalError: it is not finite.
    """
    if not torch.isfinite(total):
        named = zip(names, sums.tolist(), strict=True)
        terms = ", ".join(f"{name} {value:g}" for name, value in named)
        raise NumericalError(
            f"step {step}: the loss is not finite ({terms}); lower training.learning_rate, or look"
            " at the targets with stillroom inspect"
        )


@contextmanager
def _sum_in_head(
    model: nn.Module,
    target_index: Tensor,
    fused: FusedHead,
    losses: Sequence[Asking],
    knowledge: Knowledge,
    factors: Sequence[Tensor],
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the output head collect the sums of losses instead of giving logits.

    They are taken where the model would compute logits: autocast is on, sharded weights are whole.
    What the head gives has no position but depends on the total, so that backward passes through
    the model's output first: that is where FSDP gathers weights again.
    """
    answers: list[tuple[Tensor, Tensor]] = []

    def answer(layer: nn.Linear, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = given[0].flatten(0, -2).index_select(0, target_index)
        fused.head = replace(fused.head, weight=layer.weight, bias=layer.bias)
        answers.append(fused.sum_terms(losses, hidden, knowledge, factors))
        return (given[0][:, :0], *given[1:])

    def carry(_: nn.Linear, given: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return logits.detach() + answers[-1][0]

    layer = unwrap(model).get_output_embeddings()
    handles = [
        layer.register_forward_pre_hook(answer),
        layer.register_forward_hook(carry, prepend=True),  # before FSDP's own
    ]
    try:
        yield answers
    finally:
        for handle in handles:
            handle.remove()


def count_units(losses: Sequence[Loss], batch: Mapping[str, Any]) -> Tensor:
    """What each loss's sum over this batch counts towards the mean: its valid units or, where they
    count differently, their weights, [L] float32."""
    knowledge = read_knowledge(batch)
    found = []
    for loss in losses:
        weights = loss.weights(knowledge.of(loss.teacher))
        units = batch["counts"][COUNTED.index(loss.unit)] if weights is None else weights.sum()
        found.append(units.float())
    return torch.stack(found)


def sum_terms(
    losses: Sequence[Loss],
    student: StudentOutputs,
    batch: Mapping[str, Any],
    projections: nn.ModuleDict,
    ledger: Ledger | None = None,
) -> list[Tensor]:
    """The sum of each loss over its valid units of this batch."""
    knowledge = read_knowledge(batch)
    return [
        _sum(index, loss, student, knowledge, projections, ledger)
        for index, loss in enumerate(losses)
    ]


def _sum(
    index: int,
    loss: Loss,
    student: StudentOutputs,
    knowledge: Knowledge,
    projections: nn.ModuleDict,
    ledger: Ledger | None,
) -> Tensor:
    own = projections[str(index)]
    assert isinstance(own, nn.ModuleDict)
    if isinstance(loss, ClassLoss):  # its question looks for its teacher and the shares itself
        values = loss.per_position(student, knowledge, own)
    else:
        said = knowledge.of(loss.teacher)
        values = loss.per_position(student, said, own)
        values = values * said.shares[loss.unit] if said.shares else values
    if ledger is not None:
        ledger.enter(index, values)
    return values.sum()


def _find_head(model: nn.Module, num_classes: int | None) -> OutputHead | None:
    inner = unwrap(model)
    layer = inner.get_output_embeddings()
    if layer is None:
        return None
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{type(inner).__name__}: its output head is not linear")
    if _is_sharded(model, layer.weight):
        raise _sharded(model)
    was_training = inner.training
    try:
        head = OutputHead.of(inner.eval(), num_classes or len(layer.weight))
    finally:
        inner.train(was_training)
    return replace(head, weight=layer.weight, bias=layer.bias)


def _is_sharded(model: nn.Module, weight: Tensor) -> bool:
    """In the forward pass too, or in a way that cannot be seen through."""
    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    divided = isinstance(weight, DTensor) and not _is_gathered(model)  # tensor parallelism
    return flat or divided or hasattr(weight, "ds_id")  # DeepSpeed's mark


def _is_gathered(model: nn.Module) -> bool:
    """Sharded by FSDP2, which makes weights whole for their module's forward and backward."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _sharded(model: nn.Module) -> ModelError:
    return ModelError(f"{type(unwrap(model)).__name__}: its weights are sharded")


def name_terms(losses: Sequence[Loss]) -> list[str]:
    """Names that tell two terms of one kind apart."""
    names: list[str] = []
    for loss in losses:
        own = loss.name if loss.teacher is None else f"{loss.name}@{loss.teacher}"
        same = sum(name.split("#")[0] == own for name in names)
        names.append(f"{own}#{same + 1}" if same else own)
    return names
