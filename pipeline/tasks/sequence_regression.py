"""Numbers of a text or pair of texts: how alike, how good, how hard to read.

row -> tokens -> Example with one target, V numbers -> outputs -> Pearson, Spearman, MSE, MAE

There are no classes: the teacher's outputs are cached raw and whole, in the place of V logits. The
label id of a target is 0 where its numbers are known; they themselves are carried columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import DataError, MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.metrics import Direction, Metric, pearson, spearman
from pipeline.scores import Observation, Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.texts import TextTask


class SequenceRegression(TextTask):
    """The numbers of a whole text; rows bring `text`, maybe `text_pair`, maybe numbers.

    Attributes:
        outputs: the columns of the numbers, in the order of the teacher's outputs.
    """

    numeric: ClassVar = True

    name: Literal["sequence-regression"] = "sequence-regression"
    outputs: list[str] = Field(default=["score"], min_length=1)

    @property
    def label_names(self) -> list[str]:
        """The names of the outputs."""
        return self.outputs

    def num_classes(self, tokenizer: Any) -> int:
        """The number of outputs."""
        return len(self.outputs)

    def model_settings(self, tokenizer: Any) -> dict[str, Any]:
        """See `Task.model_settings`: the loss that transformers itself would take."""
        return {"problem_type": "regression"}

    def numbers(self, examples: Sequence[Example]) -> Tensor:
        """What the data give, [B, V] float32, nan where they give nothing."""
        rows = [[e.columns.get(name) for name in self.outputs] for e in examples]
        return torch.from_numpy(np.array(rows, dtype=np.float64)).float()

    def align(
        self, own: Example, said: CachedExample, tokenizer: Any, teacher_tokenizer: Any
    ) -> CachedExample:
        """See `Task.align`.

        Raises:
            MismatchError: they have other numbers.
        """
        mine, theirs = self.numbers([own])[0], self.numbers([said])[0]
        if bool(((mine - theirs).abs() > 0).any()):  # nan, where there is none, is never above 0
            raise MismatchError(
                f"example {own.example_id!r}: has the numbers {mine.tolist()}, the cached one"
                f" {theirs.tolist()}; choose the column that holds the cached ids with"
                " inputs.columns.id, or leave its numbers out"
            )
        return super().align(own, said, tokenizer, teacher_tokenizer)

    def observe(self, seen: Observation) -> dict[str, np.ndarray]:
        """The outputs of the model and of the teacher, [B, V] each."""
        assert seen.logits is not None
        own = seen.logits[:, : len(self.outputs)].cpu().numpy()
        said = [_said(e) for e in seen.examples if isinstance(e, CachedExample)]
        return {"own": own, "said": np.array(said) if said else np.full_like(own, np.nan)}

    def recall(self, example: CachedExample, tokenizer: Any) -> dict[str, np.ndarray]:
        """See `Task.recall`."""
        said = _said(example)[None]
        return {"own": said, "said": np.full_like(said, np.nan)}

    def metrics(self, scores: Scores) -> list[Metric]:
        """Pearson, Spearman, MSE and MAE on what the data give, and, as `..._to_teacher`, on the
        teacher's outputs; means over the outputs."""
        nothing = np.full(len(scores.label_ids), None)
        columns = [scores.columns.get(name, nothing) for name in self.outputs]
        given = np.array(columns, dtype=np.float64).T
        own, said = scores.observed["own"], scores.observed["said"]
        return [*_compare(own, given, ""), *_compare(own, said, "_to_teacher")]

    def _columns(self, row: Mapping[str, Any], carry: Sequence[str]) -> dict[str, Any]:
        given = {name: self._number(row, name) for name in self.outputs if name in row}
        return super()._columns(row, carry) | given

    def _label_ids(self, row: Mapping[str, Any]) -> list[int]:
        known = all(self._number(row, name) is not None for name in self.outputs)
        return [0 if known else UNLABELLED]

    def _number(self, row: Mapping[str, Any], name: str) -> float | None:
        number = row.get(name)
        if number is None or number != number:  # a table read from CSV holds NaN
            return None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise DataError(
                f"example {row['id']}: has {number!r} as its {name}, expected a number; map the"
                f" right column with data.columns.{name}"
            )
        return float(number)


def _said(example: CachedExample) -> np.ndarray:
    """The teacher's outputs in order, [V]."""
    targets = example.targets
    said: np.ndarray = targets.logits[0, targets.ids[0].argsort()].numpy()
    return said


def _compare(own: np.ndarray, other: np.ndarray, end: str) -> list[Metric]:
    """How near the outputs are to other numbers, over the rows that have all; [] without."""
    known = ~np.isnan(other).any(axis=1)
    if not known.any():
        return []
    pairs = list(zip(own[known].T.astype(np.float64), other[known].T, strict=True))
    figures: list[tuple[str, list[float], Direction]] = [
        ("pearson", [pearson(*pair) for pair in pairs], "higher"),
        ("spearman", [spearman(*pair) for pair in pairs], "higher"),
        ("mse", [float(np.square(mine - theirs).mean()) for mine, theirs in pairs], "lower"),
        ("mae", [float(np.abs(mine - theirs).mean()) for mine, theirs in pairs], "lower"),
    ]
    return [Metric(name + end, float(np.mean(found)), "", way) for name, found, way in figures]
