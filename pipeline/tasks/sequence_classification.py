"""One label per text or pair of texts: topics, sentiment, entailment.

row -> tokens, cut on the right -> Example with one target -> scores -> accuracy, F1, report
"""

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import DataError
from pipeline.scores import Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.classification import Classification
from pipeline.tasks.excerpts import pick_excerpts
from pipeline.tasks.texts import TextTask


class SequenceClassification(TextTask, Classification):
    """The class of a whole text; rows bring `text`, maybe `text_pair`, maybe `label`."""

    name: Literal["sequence-classification"] = "sequence-classification"

    def details(self, scores: Scores) -> dict[str, Any]:
        """See `Classification.details`; and some texts, where they are carried."""
        excerpts = pick_excerpts(scores, self._known_labels())
        return super().details(scores) | ({"excerpts": excerpts} if excerpts else {})

    def _label_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The class of each of an example's targets."""
        label = row.get("label")
        if isinstance(label, list):
            raise DataError(
                f"example {row['id']}: has a list of labels, {self.name} has one label for a text;"
                " use multi-label-classification"
            )
        return [UNLABELLED if label is None else self._check_label(label, row)]
