"""Any number of labels per text: emotions, subjects, tags.

    row -> tokens -> Example with a target for each label -> F1 per label, subset accuracy

Each label is a question of its own with two answers, no and yes. A model gives one logit z per
label, and (0, z) are the logits of the two: sigmoid(z) is their softmax. So all that is said of
distributions over classes holds: divergences, cross-entropy (which is binary here), temperatures.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.examples import Example
from pipeline.metrics import Metric, expected_calibration_error
from pipeline.scores import Inputs, Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.causal_lm import teacher_metrics
from pipeline.tasks.classification import Classification, report_classes
from pipeline.tasks.texts import TextTask


class MultiLabelClassification(TextTask, Classification):
    """The labels of a whole text; rows bring `text`, maybe `text_pair`, maybe `label`, a list.

    An empty list says that no label applies; a text without a list is unlabelled.
    """

    name: Literal["multi-label-classification"] = "multi-label-classification"

    def num_classes(self, tokenizer: Any) -> int:
        """Two, no and yes; how many labels there are, `num_labels` says."""
        self._known_labels()
        return 2

    def model_settings(self, tokenizer: Any) -> dict[str, Any]:
        """See `Task.model_settings`: the loss that transformers itself would take."""
        return {"problem_type": "multi_label_classification"}

    def logits(self, outputs: Any, inputs: Inputs) -> Tensor:
        """(0, z) of each label of each example, [B * L, 2]."""
        z: Tensor = outputs.logits.flatten()
        return torch.stack([torch.zeros_like(z), z], dim=-1)

    def row(self, example: Example) -> dict[str, Any]:
        """See `Task.row`."""
        row = super().row(example)
        if row["label"] is not None:
            row["label"] = np.flatnonzero(example.label_ids == 1).tolist()
        return row

    def metrics(self, scores: Scores) -> list[Metric]:
        """F1, subset accuracy (all labels right), loss and calibration on labels; agreement and KL
        with the teacher, label by label."""
        labels, predictions = self._tables(scores)
        found = []
        if len(labels):
            known = scores.where(scores.label_ids != UNLABELLED)
            correct = known.predictions == known.label_ids
            *_, f1, support = _per_label(labels, predictions)
            hits, both = _count_hits(labels, predictions), labels.sum() + predictions.sum()
            micro = 200.0 * float(hits.sum()) / max(float(both), 1.0)
            whole = 100.0 * float((labels == predictions).all(axis=1).mean())
            ece = expected_calibration_error(known.confidence, correct)
            found += [
                Metric("micro_f1", micro, "%", "higher"),
                Metric("macro_f1", 100.0 * _mean(f1[support > 0]), "%", "higher"),
                Metric("subset_accuracy", whole, "%", "higher"),
                Metric("loss", -float(known.label_log_probs.mean()), "nats/label", "lower"),
                Metric("ece", ece, "%", "lower"),
            ]
        return found + teacher_metrics(scores)

    def details(self, scores: Scores) -> dict[str, Any]:
        """A report per label, shares in percent; empty where nothing is labelled."""
        labels, predictions = self._tables(scores)
        if not len(labels):
            return {}
        report = report_classes(self._known_labels(), _per_label(labels, predictions))
        return {"classification_report": report}

    def _label_ids(self, row: Mapping[str, Any]) -> list[int]:
        """1 for a label that applies, 0 for one that does not."""
        given, count = row.get("label"), len(self._known_labels())
        if given is None:
            return [UNLABELLED] * count
        keys = given if isinstance(given, list) else [given]
        applies = {self._check_label(key, row) for key in keys}
        return [int(label in applies) for label in range(count)]

    def _tables(self, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
        """Labels and predictions of the labelled examples, [n, L] of 0 and 1 each."""
        count = len(self._known_labels())
        labels, predictions = (
            values.reshape(-1, count) for values in (scores.label_ids, scores.predictions)
        )
        labelled = (labels != UNLABELLED).all(axis=1)
        return labels[labelled], predictions[labelled]


def _count_hits(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    hits: np.ndarray = (labels * predictions).sum(axis=0).astype(np.float64)
    return hits


def _per_label(
    labels: np.ndarray, predictions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support of each label, [L] each, 0 where undefined."""
    hits = _count_hits(labels, predictions)
    support, predicted = labels.sum(axis=0), predictions.sum(axis=0)
    f1 = 2.0 * hits / np.maximum(support + predicted, 1)
    return hits / np.maximum(predicted, 1), hits / np.maximum(support, 1), f1, support


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
