"""Checkpoints as students: opened with the task's Auto class, and refused where they do not fit.

folder or hub name -> config -> weights -> which are missing? -> does it look ahead? -> model
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from pipeline.errors import MismatchError, ModelError
from pipeline.safe_loading import NO_CODE, require_safetensors
from pipeline.student.probing import require_causal
from pipeline.tasks.base import Task


def load_model(
    name: str,
    task: Task,
    num_classes: int,
    revision: str | None = None,
    dropout: float | None = None,
) -> transformers.PreTrainedModel:
    """Open a checkpoint with the task's Auto class, in float32.

    A classifier gets a new head where the checkpoint has none of this size; nothing else may be
    missing.

    Raises:
        ModelError: it is missing, of another architecture, or has too few classes.
        MismatchError: it has the same labels in another order.
    """
    auto = getattr(transformers, task.auto_class)
    require_safetensors(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
        if dropout is not None:
            set_dropout(config, dropout)
        _require_label_order(name, config, task)
        if (labels := task.num_labels()) is not None:
            config.num_labels = labels
        model, found = auto.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            **NO_CODE,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: cannot be opened as {task.auto_class} ({first})") from error
    _require_weights(model, found, task, name)
    check_classes(model, task, num_classes, name)
    require_causal(model, task, name)
    task.equip(model, name, revision)
    return model


def _require_label_order(name: str, config: Any, task: Task) -> None:
    """Other labels are another task, whose head is where this one begins; another order of the same
    labels is a mistake that no shape tells."""
    own, names = list((config.id2label or {}).values()), task.label_names
    if names is not None and own != names and sorted(own) == sorted(names):
        raise MismatchError(
            f"{name}: its labels are {', '.join(own[:8])}, those of the cache"
            f" {', '.join(names[:8])}; cache the teacher with data.label_names in the student's"
            " order, or choose a student without a head"
        )


def check_classes(model: nn.Module, task: Task, num_classes: int, name: str) -> None:
    """Refuse a head with fewer rows than there are classes."""
    config: Any = model.config
    if not task.vocabulary:
        return  # a head that does not fit is a new one
    rows = config.get_text_config().vocab_size
    if rows < num_classes:
        raise ModelError(
            f"{name}: has {rows:,} classes, the cache has {num_classes:,}; choose a student whose"
            " head covers the cached class space, or cache the teacher with this tokenizer"
        )


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate that an architecture's configuration has."""
    for name, value in vars(config).items():
        is_rate = isinstance(value, float | int) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, rate)


def _require_weights(model: nn.Module, found: Mapping[str, Any], task: Task, name: str) -> None:
    """Refuse weights that transformers would have made up; a new classification head is fine."""
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in found["mismatched_keys"]
    }
    lacking = sorted({*found["missing_keys"], *mismatched})
    prefix = str(model.base_model_prefix)
    if task.pooled:
        lacking = [key for key in lacking if not key.startswith("pooler.")]  # which nothing reads
    elif not task.vocabulary and hasattr(model, prefix):
        backbone = f"{prefix}."
        lacking = [key for key in lacking if key.startswith(backbone) and "pooler" not in key]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ModelError(
            f"{name}: is no checkpoint of {type(model).__name__}, it lacks {lacking[0]}{more};"
            f" choose one that {task.auto_class} opens whole"
        )
