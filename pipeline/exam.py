"""Held-out measurement of one task: points of the curve while a student learns, scores at the end.

EvaluationConfig + examples by split -> Exam -- curve(model) --> metrics; final(model) --> Scores
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.arguments import EvaluationConfig
from pipeline.batches import Collator, Selection
from pipeline.errors import ConfigError, did_you_mean
from pipeline.evaluation import measure, score_model
from pipeline.metrics import Metric
from pipeline.scores import Scores
from pipeline.tasks.base import Task


class Exam:
    """What a student of one task is measured on.

    Attributes:
        evaluation: the settings.
    """

    def __init__(
        self,
        task: Task,
        held_out: Mapping[str, Selection],
        evaluation: EvaluationConfig,
        collator: Collator,
        tokenizer: Any,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Choose the examples.

        Args:
            held_out: split name -> examples.
            collator: that of training; what belongs to several teachers and terms is left out.
            rank, world_size: of the processes that share the work.

        Raises:
            ConfigError: a split or column of the settings does not exist.
        """
        self.evaluation = evaluation
        self._task = task
        self._final = _pick_split(held_out, evaluation.split, "split")
        _require_columns(self._final, evaluation.slices, "slices")
        curve = _pick_split(held_out, evaluation.curve_split or evaluation.split, "curve_split")
        self._curve = _curve_examples(curve, evaluation)
        _require_columns(self._curve, evaluation.curve_columns, "curve_slices")
        # One teacher measures, every example alike, without hidden states.
        self._collator = replace(collator, signals={}, company=None, marks=None)
        self._shared: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "tokenizer": tokenizer,
        }

    def curve(self, model: nn.Module) -> list[Metric]:
        """The metrics of a point of the curve."""
        return measure(self._task, self._score(model, self._curve), self.evaluation.curve_columns)

    def final(self, model: nn.Module) -> Scores:
        """The scores on the final split."""
        return self._score(model, self._final)

    def _score(self, model: nn.Module, examples: Selection) -> Scores:
        size = self.evaluation.batch_size
        return score_model(model, examples, self._collator, size, **self._shared)


def _pick_split(held_out: Mapping[str, Selection], split: str, setting: str) -> Selection:
    if split not in held_out:
        hint = did_you_mean(split, held_out)
        raise ConfigError(f"evaluation.{setting}: there is no split {split!r}{hint}")
    return held_out[split]


def _require_columns(examples: Selection, columns: Sequence[str], setting: str) -> None:
    """Refuse a slice by a column that is not there, before anything is trained for it."""
    known = examples[0].columns if columns and len(examples) else {}
    for column in columns:
        if column not in known:
            hint = did_you_mean(column, known) if known else "; data.carry takes columns along"
            raise ConfigError(f"evaluation.{setting}: no example has a column {column!r}{hint}")


def _curve_examples(examples: Selection, evaluation: EvaluationConfig) -> Selection:
    wanted = evaluation.curve_examples
    if wanted is None or wanted >= len(examples):
        return examples
    picked = [index * len(examples) // wanted for index in range(wanted)]
    return Selection(examples.source, examples.indices[picked])
