"""The settings of a training: what is measured and when to stop, and transformers' own arguments.

config -> EvaluationConfig; `training:` and it -> transformers.TrainingArguments
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field
from transformers.integrations import get_available_reporting_integrations

from pipeline.config import StrictModel
from pipeline.errors import ConfigError, did_you_mean
from pipeline.metrics import Metric


class EarlyStopping(StrictModel):
    """Stop when a metric of the curve has not improved `patience` times; keep the best.

    Which way is better is the metric's own affair (`Metric.direction`).

    Attributes:
        metric: its name, for instance macro_f1.
        slice: where it is measured: all, or column=value.
        patience: points of the curve without a new best.
    """

    metric: str = "loss"
    slice: str = Field(default="all", pattern="^all$|^[^=]+=.*$")
    patience: int = Field(default=3, ge=1)

    @property
    def key(self) -> str:
        """The metric's name in the curve; see `Metric.key`."""
        return self.metric if self.slice == "all" else f"{self.metric}/{self.slice}"


class EvaluationConfig(StrictModel):
    """What is measured on held-out examples.

    Attributes:
        split: the split the final metrics are taken on.
        curve_split: the split measured while training; `split` where left out.
        every: optimizer steps between two points of the curve; None for the end only.
        curve_examples: this many examples, evenly spread over the split, for each point.
        batch_size: examples per forward pass.
        task: settings of the task that decide what is measured, for instance evaluate of seq2seq.
        slices: columns whose values get metrics of their own.
        curve_slices: the same while training; the column that early stopping watches is one.
        early_stopping: on a metric of the curve.
    """

    split: str = "test"
    curve_split: str | None = None
    every: int | None = Field(default=None, ge=1)
    curve_examples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    task: dict[str, Any] = {}
    slices: list[str] = []
    curve_slices: list[str] = []
    early_stopping: EarlyStopping | None = None

    @property
    def splits(self) -> set[str]:
        """Those that anything is measured on."""
        return {self.split, self.curve_split or self.split}

    @property
    def curve_columns(self) -> list[str]:
        """The columns that each point of the curve is sliced by."""
        watched = self.early_stopping.slice.partition("=") if self.early_stopping else ("", "", "")
        return list(dict.fromkeys([*self.curve_slices, *([watched[0]] if watched[1] else [])]))


def training_arguments(
    settings: Mapping[str, Any],
    evaluation: EvaluationConfig,
    output: Path,
    stage: str | None = None,
) -> transformers.TrainingArguments:
    """transformers.TrainingArguments by their own names, over this project's defaults.

    Args:
        output: the run's folder.
        stage: the stage's name, None where there is one only.

    Raises:
        ConfigError: a setting does not exist (with the nearest name) or does not fit.
    """
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    for name in settings:
        if name not in known:
            raise ConfigError(f"training.{name}: is no setting{did_you_mean(name, known)}")
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "logging_steps": evaluation.every or 50,
        "save_steps": evaluation.every or 500,
        "save_total_limit": 1,
        "report_to": "none",
        "run_name": output.name,
        "disable_tqdm": True,
        "log_level": "error",
        "logging_nan_inf_filter": False,  # the trainer stops at the first of them
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Projections are used outside forward(), where DDP would take them for unused.
        "ddp_find_unused_parameters": False,
        "eval_strategy": "steps" if evaluation.every else "no",
    }
    if evaluation.every:
        defaults["eval_steps"] = evaluation.every
    if evaluation.early_stopping:
        defaults |= _early_stopping_arguments(evaluation)
    fixed = {"output_dir": str(output / "checkpoints" / (stage or ""))}
    try:
        args = transformers.TrainingArguments(**defaults | dict(settings) | fixed)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error
    installed = set(get_available_reporting_integrations())
    for name in args.report_to:
        if name not in installed:
            hint = did_you_mean(name, installed)
            raise ConfigError(f"training.report_to: {name} is not installed here{hint}; install it")
    return args


def watch(args: transformers.TrainingArguments, found: Sequence[Metric]) -> None:
    """Tell transformers which way the metric that early stopping watches is better.

    Raises:
        ConfigError: it is not among the metrics found, or no better when it is higher or lower.
    """
    if args.metric_for_best_model is None:
        return
    watched = args.metric_for_best_model.removeprefix("eval_")
    directions = {metric.key: metric.direction for metric in found}
    if watched not in directions:
        raise ConfigError(
            f"evaluation.early_stopping.metric {watched!r} is not measured"
            f"{did_you_mean(watched, directions)}"
        )
    if directions[watched] == "none":
        raise ConfigError(
            f"evaluation.early_stopping.metric {watched!r} is neither better when higher nor when"
            " lower; choose another"
        )
    args.greater_is_better = directions[watched] == "higher"


def _early_stopping_arguments(evaluation: EvaluationConfig) -> dict[str, Any]:
    stopping = evaluation.early_stopping
    assert stopping is not None
    if evaluation.every is None:
        raise ConfigError(
            "evaluation.early_stopping: needs evaluation.every; say after how many steps"
        )
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{stopping.key}",
        "greater_is_better": False,  # until the trainer has seen the metric and its direction
        "restore_callback_states_from_checkpoint": True,  # how long it has been patient
    }
