"""Student, losses and stream joined on transformers.Trainer.

    batches -> model -> StudentOutputs -> each loss, one value per position -> sum / global count

The one place that normalises: every term is divided by the number of its valid units in the whole
optimizer step, over all micro-batches and ranks, so that no split of a step changes its gradient.
The trainer is handed examples; it does not know whether a teacher ever lived.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from pipeline.batches import UNITS, Collator, EpochSampler, Selection
from pipeline.errors import ConfigError, NumericalError
from pipeline.losses.base import Knowledge, Loss, StudentOutputs
from pipeline.metrics import Metric

PROJECTIONS = (
    "distillation_projections"  # the student's attribute that holds the losses' parameters
)

Evaluate = Callable[[nn.Module], Sequence[Metric]]


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A transformers.Trainer whose loss is a weighted sum of the project's losses.

    Args:
        model: the student; `attach_projections` has given it the losses' parameters.
        losses: the terms.
        train: the examples to learn from.
        collator: joins them into batches.
        args: transformers' own arguments.
        evaluate_model: measures the student on held-out examples; None for no evaluation.
        metrics_file: one JSON line per log.
        callbacks: transformers callbacks, for instance early stopping.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        losses: Sequence[Loss],
        train: Selection,
        collator: Collator,
        args: TrainingArguments,
        evaluate_model: Evaluate | None = None,
        metrics_file: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.losses = tuple(losses)
        self.sampler = EpochSampler(len(train), args.seed)
        self.evaluate_model = evaluate_model
        self.metrics_file = metrics_file
        self.seconds_evaluating = 0.0
        self._began = time.perf_counter()
        self._term_sums = dict.fromkeys(_term_names(self.losses), 0.0)
        self._steps_summed = 0
        args.remove_unused_columns = False  # the targets are no argument of forward()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=train if evaluate_model else None,  # evaluate() measures on its own
            data_collator=collator,
            callbacks=[_SetEpoch(self.sampler), *callbacks],
        )
        # Our loss is normalised over the whole step: the parent must not divide it again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Collect the micro-batches of one optimizer step and count their valid units, [4]."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if not batches:
            return batches, None
        counts = torch.stack([batch["counts"] for batch in batches]).sum(dim=0)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device), reduction="sum")
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted terms of a micro-batch over the units of the whole optimizer step.

        Args:
            num_items_in_batch: [4] counts in the order of `batches.UNITS`; the batch's own if None.
        """
        counts = inputs["counts"] if num_items_in_batch is None else num_items_in_batch
        outputs, student = run_student(model, inputs, self.losses)
        sums = sum_terms(self.losses, student, inputs, projections_of(model))
        progress = self.state.global_step / max(self.state.max_steps, 1)
        total = student.logits.new_zeros((), dtype=torch.float32)
        for name, loss, value in zip(self._term_sums, self.losses, sums, strict=True):
            mean = value / counts[UNITS.index(loss.unit)].clamp(min=1.0).to(value)
            total = total + loss.weight_at(progress) * mean
            self._term_sums[name] += float(mean.detach()) / _printed_scale(loss)
        if not torch.isfinite(total):
            terms = ", ".join(
                f"{name} {float(value):g}"
                for name, value in zip(self._term_sums, sums, strict=True)
            )
            raise NumericalError(
                f"step {self.state.global_step}: the loss is not finite ({terms}); lower"
                " training.learning_rate, or look at the targets with stillroom inspect"
            )
        # DDP averages gradients over ranks; the counts above are already those of all ranks.
        total = total * self.args.world_size if num_items_in_batch is not None else total
        return (total, outputs) if return_outputs else total

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the student on the held-out examples with the task's own metrics."""
        if self.evaluate_model is None:
            return {}
        began = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        found = self.evaluate_model(self.model)
        self.model.train(was_training)
        self.seconds_evaluating += time.perf_counter() - began
        metrics = {f"{metric_key_prefix}_{m.name}": m.value for m in found if m.slice == "all"}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with each term by name, and append to the metrics file."""
        if "loss" in logs:
            steps = max(self.state.global_step - self._steps_summed, 1)
            logs |= {f"term/{name}": value / steps for name, value in self._term_sums.items()}
            self._steps_summed = self.state.global_step
            self._term_sums = dict.fromkeys(self._term_sums, 0.0)
        super().log(logs, start_time)
        if self.metrics_file is not None and self.is_world_process_zero():
            self._append(logs)

    def _append(self, logs: Mapping[str, float]) -> None:
        held_out = any(key.startswith("eval_") for key in logs)
        if not held_out and "loss" not in logs:
            return  # the closing summary of transformers, in no unit of ours
        line = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "split": "eval" if held_out else "train",
            "seconds": time.perf_counter() - self._began - self.seconds_evaluating,
            **{key.removeprefix("eval_"): value for key, value in logs.items()},
        }
        assert self.metrics_file is not None
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: a batch is more than the inputs of one model."""
        return 0


class _SetEpoch(TrainerCallback):  # type: ignore[misc]
    """Tell the sampler the epoch, whatever the loader was wrapped in."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def attach_projections(
    model: PreTrainedModel, losses: Sequence[Loss], teacher_widths: Mapping[str, int]
) -> None:
    """Give the student the learned parameters of its losses, so that they train and checkpoint."""
    width = int(getattr(model.config, "hidden_size", 0))
    modules = nn.ModuleDict()
    for index, loss in enumerate(losses):
        teacher_width = next(
            (teacher_widths[signal] for signal in _signals(loss) if signal in teacher_widths), 0
        )
        modules[str(index)] = loss.projections(width, teacher_width)
    model.add_module(PROJECTIONS, modules)


def projections_of(model: nn.Module) -> nn.ModuleDict:
    """The module `attach_projections` added, under any wrapper."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    found = getattr(inner, PROJECTIONS)
    assert isinstance(found, nn.ModuleDict)
    return found


def run_student(
    model: nn.Module, batch: Mapping[str, Any], losses: Sequence[Loss]
) -> tuple[Any, StudentOutputs]:
    """Call the student and keep what counts: logits at targets, hidden states at features."""
    layers = sorted({layer for loss in losses for layer in loss.layer_map})
    pooled = any(loss.needs_pooled for loss in losses)
    wanted = {"output_hidden_states": True} if layers or pooled else {}
    outputs = model(**batch["inputs"], **wanted)
    logits = outputs.logits.flatten(0, -2).index_select(0, batch["target_index"])
    if not (layers or pooled):
        return outputs, StudentOutputs(logits)
    depth = len(outputs.hidden_states)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(
                f"losses: the student has no layer {layer}; it has 0 (embeddings) to {depth - 1}"
            )
    hidden = {
        layer: outputs.hidden_states[layer].flatten(0, 1).index_select(0, batch["feature_index"])
        for layer in layers
    }
    vector = pool(outputs.hidden_states[-1], batch["inputs"]) if pooled else None
    return outputs, StudentOutputs(logits, hidden, vector)


def pool(hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean of [B, T, D] over the tokens that are not padding, [B, D]."""
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def sum_terms(
    losses: Sequence[Loss],
    student: StudentOutputs,
    batch: Mapping[str, Any],
    projections: nn.ModuleDict,
) -> list[Tensor]:
    """The sum of each loss over its valid units of this batch."""
    knowledge = Knowledge(batch.get("targets"), batch["label_ids"], batch.get("hidden", {}))
    sums = []
    for index, loss in enumerate(losses):
        own = projections[str(index)]
        assert isinstance(own, nn.ModuleDict)
        sums.append(loss.per_position(student, knowledge, own).sum())
    return sums


def _signals(loss: Loss) -> list[str]:
    layers = [f"layer.{layer}" for layer in loss.layer_map.values()]
    return [*layers, "pooled"] if loss.needs_pooled else layers


def _term_names(losses: Sequence[Loss]) -> list[str]:
    """Names that tell two terms of one kind apart."""
    names: list[str] = []
    for loss in losses:
        same = sum(name.split("#")[0] == loss.name for name in names)
        names.append(f"{loss.name}#{same + 1}" if same else loss.name)
    return names


def _printed_scale(loss: Loss) -> float:
    """T², which belongs to the gradient: terms are logged without it, comparable across runs."""
    return float(np.square(loss.temperature_needed or 1.0))
