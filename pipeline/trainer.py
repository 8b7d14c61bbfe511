"""Student, losses and stream joined on transformers.Trainer.

    batches -> model -> StudentOutputs -> each loss, one value per position -> sum / global count

The one place that normalises: every term is divided by the number of its valid units in the whole
optimizer step, over all micro-batches and ranks, so that no split of a step changes its gradient.
The trainer is handed examples; it does not know whether a teacher ever lived.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from pipeline.accounts import Ledger, SliceMeans
from pipeline.arguments import watch
from pipeline.batches import COUNTED, Collator, Selection
from pipeline.curve import Curve
from pipeline.freezing import Gradual, Unfreezing
from pipeline.loader import SetEpoch, load_batches
from pipeline.lockstep import Seat
from pipeline.losses.base import Loss
from pipeline.losses.fused import FusedHead
from pipeline.metrics import Metric
from pipeline.optimizing import LearningRates, group_settings
from pipeline.outputs import read_knowledge
from pipeline.terms import (
    check_finite,
    count_units,
    fuse_head,
    name_terms,
    weigh_terms,
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
        curve: takes one line per log, and says which epoch comes first.
        seconds_before: of training before this session, where a run continues.
        learning_rates: of parts of the model that do not learn at `args.learning_rate`.
        seat: among students that read their batches together.
        gradual: lets layers learn one after the other.
        callbacks: transformers callbacks, for instance early stopping.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        losses: Sequence[Loss],
        train: Selection,
        collator: Collator,
        args: Arguments,
        evaluate_model: Evaluate | None = None,
        curve: Curve | None = None,
        seconds_before: float = 0.0,
        learning_rates: LearningRates | None = None,
        seat: Seat | None = None,
        gradual: Gradual | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.losses = tuple(losses)
        self.task = collator.task
        self.term_names = name_terms(self.losses)
        self.evaluate_model = evaluate_model
        self.curve = curve
        self.learning_rates = learning_rates
        self.seat = seat
        self.gradual = gradual
        self._unfreezing: Unfreezing | None = None
        self.seconds_evaluating = 0.0
        self._began = time.perf_counter() - seconds_before - (seat.waited if seat else 0.0)
        self._term_sums = torch.zeros(len(self.losses))
        self._steps_summed = 0
        marks = collator.marks
        self._slices = SliceMeans(self.term_names, marks) if marks and marks.slices else None
        self._fused: dict[int, FusedHead | None] = {}
        args.remove_unused_columns = False  # the targets are no argument of forward()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=train if evaluate_model else None,  # evaluate() measures on its own
            data_collator=collator,
            callbacks=[SetEpoch(), *callbacks, *([seat] if seat else [])],
        )
        self.remove_callback(PrinterCallback)  # prints dictionaries; see `callbacks`
        # Our loss is normalised over the whole step: the parent must not divide it again.
        self.model_accepts_loss_kwargs = True
        if args.world_size > 1:  # other dropout on each rank; the weights stand already
            torch.manual_seed(args.seed + args.process_index)

    @property
    def seconds_training(self) -> float:
        """Seconds of training, earlier sessions included; evaluation and what other students of
        the same launch took are left out."""
        elsewhere = self.seconds_evaluating + (self.seat.waited if self.seat else 0.0)
        return time.perf_counter() - self._began - elsewhere

    @property
    def progress(self) -> float:
        """The share of the steps that were taken."""
        return float(self.state.global_step / max(self.state.max_steps, 1))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of every batch; accelerate would repeat examples to fill the last."""
        size, first = self._train_batch_size, self.curve.next_epoch if self.curve else 0
        return load_batches(
            self.train_dataset, self.data_collator, self.args, size, first, self.seat
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, in groups of their own where parts learn at other rates.

        Raises:
            ConfigError: a pattern of names matches nothing, or the optimizer makes its own groups.
        """
        chosen = self.model if model is None else model
        if self.optimizer is None and self.learning_rates is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            decayed = set(self.get_decay_parameter_names(chosen))
            own = group_settings(chosen, self.learning_rates, self.args, decayed, settings)
            self.optimizer_cls_and_kwargs = (kind, own)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Collect the micro-batches of one optimizer step and count their valid units."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches or self.control.should_training_stop:  # an earlier session had ended it
            return [], None
        self._steps_summed += 1
        self._unfreeze()
        units = torch.stack([self._count_units(batch) for batch in batches])
        tokens = torch.stack([batch["counts"][COUNTED.index("tokens")] for batch in batches])
        units, tokens = units.sum(dim=0).to(device), tokens.sum().to(device)
        if self.args.world_size > 1:
            units, tokens = (self.accelerator.reduce(n, reduction="sum") for n in (units, tokens))
        # Part of the state, so that it goes into checkpoints and is exact after resuming.
        self.state.num_input_tokens_seen += int(tokens)
        return batches, units

    def _unfreeze(self) -> None:
        """Let those layers learn whose turn has come; the optimizer, made before, has them all."""
        if self.gradual is None:
            return
        if self._unfreezing is None:
            self._unfreezing = Unfreezing(self.model, self.gradual, self.args.world_size == 1)
        self._unfreezing.advance(self.progress)

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """A forward and a backward pass, after which nothing that is frozen has a gradient."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._unfreezing is not None:
            self._unfreezing.drop_gradients()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted terms of a micro-batch over the units of the whole optimizer step.

        Args:
            num_items_in_batch: of each loss, [L]; the batch's own if None.
        """
        units = self._count_units(inputs) if num_items_in_batch is None else num_items_in_batch
        shares = torch.where(units > 0.0, 1.0 / units, 0.0)
        progress = self.progress
        losses = [loss.at(progress) for loss in self.losses]
        factors = [
            loss.weight_at(progress) * share for loss, share in zip(losses, shares, strict=True)
        ]
        ledger = None if self._slices is None else Ledger(len(self.losses))
        total, sums, outputs = self._weigh_terms(model, inputs, losses, factors, ledger)
        if self._slices is not None and ledger is not None:
            self._slices.add(losses, inputs, ledger, read_knowledge(inputs))
        check_finite(total, sums, self.term_names, self.state.global_step)
        scales = torch.tensor([loss.gradient_scale for loss in losses])
        means = (sums * shares.to(sums) / scales.to(sums)).float()
        self._term_sums = self._term_sums.to(total.device) + means
        # DDP averages gradients over ranks; the units above are already those of all ranks.
        total = total * self.args.world_size if num_items_in_batch is not None else total
        return (total, outputs) if return_outputs else total

    def _count_units(self, batch: Mapping[str, Any]) -> Tensor:
        """What each loss's sum over a batch counts, [L]."""
        return count_units(self.losses, batch)

    def _weigh_terms(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        losses: Sequence[Loss],
        factors: Sequence[Tensor],
        ledger: Ledger | None,
    ) -> tuple[Tensor, Tensor, Any]:
        head = self._fused_head(model, batch)
        return weigh_terms(model, batch, losses, factors, head, self.task, ledger)

    def _fused_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> FusedHead | None:
        """A student's head, probed at its first step."""
        if self.args.torch_compile:  # a hook that comes and goes would compile every step anew
            return None
        if id(model) not in self._fused:
            targets = inputs.get("targets")
            found = fuse_head(model, None if targets is None else targets.num_classes)
            self._fused[id(model)] = found
        return self._fused[id(model)]

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """To the device, the targets too, which are no plain tensors."""
        moved: dict[str, Any] = super()._prepare_inputs(inputs)
        for said in (moved, *moved.get("teachers", {}).values()):
            if "targets" in said:
                said["targets"] = said["targets"].to(self.args.device)
        return moved

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the student on the held-out examples with the task's own metrics.

        Raises:
            ConfigError: the metric that early stopping watches is not among them, or no better
                when it is higher or lower.
        """
        if self.evaluate_model is None:
            return {}
        began = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        found = self.evaluate_model(self.model)
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{m.key}": m.value for m in found}
        watch(self.args, found)
        self.seconds_evaluating += time.perf_counter() - began
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with each term by name, and append to the curve."""
        if "loss" in logs:
            logs |= self._mean_terms()
        super().log(logs, start_time)
        if self.curve is not None and self.is_world_process_zero():
            state = self.state
            self.curve.append(state.global_step, state.epoch or 0.0, self.seconds_training, logs)

    def _mean_terms(self) -> dict[str, float]:
        """Means over the steps since the last log; each rank has the sums of its own share."""
        sums = self._sum_over_ranks(self._term_sums)
        steps, self._steps_summed = max(self._steps_summed, 1), 0
        self._term_sums = torch.zeros_like(sums)
        named = zip(self.term_names, sums.tolist(), strict=True)
        found = {f"term/{name}": value / steps for name, value in named}
        if self._slices is not None:
            found |= self._slices.name(self._sum_over_ranks(self._slices.take()))
        return found

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        found: Tensor = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        return found

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: a batch is more than the inputs of one model."""
        return 0
