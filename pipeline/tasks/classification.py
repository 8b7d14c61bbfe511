"""What all tasks with named classes share: the labels and the field's metrics of them.

label ids, predictions -> accuracy, macro F1, loss, calibration; report and confusions per class
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.errors import ConfigError, DataError
from pipeline.metrics import Metric, expected_calibration_error, precision_recall_f1
from pipeline.scores import Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Task
from pipeline.tasks.causal_lm import teacher_metrics


class Classification(Task):
    """A task whose classes have names.

    Attributes:
        labels: class names in order; taken from the rows by the caller where left out.
    """

    vocabulary: ClassVar = False
    shifted: ClassVar = False
    same_tokens: ClassVar = False

    labels: list[str] | None = Field(default=None, min_length=2)

    def num_classes(self, tokenizer: Any) -> int:
        """The number of labels.

        Raises:
            ConfigError: the labels were neither configured nor taken from the rows.
        """
        return len(self._known_labels())

    def metrics(self, scores: Scores) -> list[Metric]:
        """Accuracy, macro F1, loss and calibration on labels; agreement and KL with the teacher."""
        labelled = scores.where(scores.label_ids != UNLABELLED)
        found = []
        if len(labelled.label_ids):
            correct = labelled.predictions == labelled.label_ids
            _, _, f1, support = self._per_class(labelled)
            ece = expected_calibration_error(labelled.confidence, correct)
            found += [
                Metric("accuracy", 100.0 * float(correct.mean()), "%", "higher"),
                Metric("macro_f1", 100.0 * float(f1[support > 0].mean()), "%", "higher"),
                Metric("loss", -float(labelled.label_log_probs.mean()), "nats", "lower"),
                Metric("ece", ece, "%", "lower"),
            ]
        return found + teacher_metrics(scores)

    def details(self, scores: Scores) -> dict[str, Any]:
        """A classification report (shares in percent) and a confusion matrix.

        Rows of the matrix are labels, columns predictions, both in the order of `labels`. Empty
        where nothing is labelled.
        """
        labelled = scores.where(scores.label_ids != UNLABELLED)
        if len(labelled.label_ids) == 0:
            return {}
        names = self._known_labels()
        columns = self._per_class(labelled)
        report = report_classes(names, columns)
        pairs = labelled.label_ids * len(names) + labelled.predictions
        matrix = np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), len(names))
        confusion = {"labels": names, "counts": matrix.tolist()}
        return {"classification_report": report, "confusion_matrix": confusion}

    def _per_class(self, scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        classes = len(self._known_labels())
        return precision_recall_f1(scores.label_ids, scores.predictions, classes)

    def _known_labels(self) -> list[str]:
        if self.labels is None:
            raise ConfigError(
                f"task {self.name}: the data has no column of labels and task.labels is empty; name"
                " the classes in task.labels"
            )
        return self.labels

    def _check_label(self, label: Any, row: Mapping[str, Any]) -> int:
        """A class number, where the label set has it."""
        if self.labels is not None and not 0 <= label < len(self.labels):
            raise DataError(
                f"example {row['id']}: label {label} is outside the label set of"
                f" {len(self.labels)} ({', '.join(self.labels)}); mend the data or task.labels"
            )
        return int(label)


def report_classes(names: Sequence[str], columns: Sequence[np.ndarray]) -> dict[str, Any]:
    """Precision, recall, F1 (in percent) and support of each class, by its name.

    Args:
        columns: these four, [V] each.
    """
    return {
        name: {
            "precision": 100.0 * float(precision),
            "recall": 100.0 * float(recall),
            "f1": 100.0 * float(f1),
            "support": int(support),
        }
        for name, precision, recall, f1, support in zip(names, *columns, strict=True)
    }
