"""What the teacher reads and where it is asked: the unit that everything else is keyed by.

An `Example` is made by a task from a row of a data set; a cache returns it as a `CachedExample`,
with what the teacher said. Row t of the targets is the teacher's distribution of the token at
position t + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.errors import MismatchError
from pipeline.targets import UNLABELLED, Targets

Column = str | int | float | bool | list[str] | None


LANGUAGE_COLUMNS = ("language", "lang", "locale")  # whose values are codes of languages


@dataclass(frozen=True)
class Example:
    """One unit of teacher work with a name that survives shuffling, filtering and re-reading.

    Attributes:
        example_id: unique in its data set and stable from run to run.
        input_ids: [T] int32, the tokens the model reads, without padding.
        segment_lengths: [documents] int32, lengths of the documents packed into input_ids, which
            must not see one another, or of what else `Task.segments` says; they sum to T. One entry
            where nothing is packed.
        target_positions: [N] int32, positions whose distribution is asked for, ascending; one
            entry, 0, for a task that has one distribution for the whole example; the numbers of the
            labels for one that has a distribution for each.
        label_ids: [N] int32, the class each distribution is about (for a language model the token
            at position + 1), UNLABELLED (-100) where there is none.
        columns: carried through to the student and to slices of metrics (language, split, text,
            ...).
    """

    example_id: str
    input_ids: np.ndarray
    segment_lengths: np.ndarray
    target_positions: np.ndarray
    label_ids: np.ndarray
    columns: Mapping[str, Column] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedExample(Example):
    """An example with what the teacher said about it.

    Attributes:
        targets: the N target positions' knowledge, on the CPU.
        hidden: by signal name: "layer.<i>" (0 = embeddings) and other per-position signals
            ("query.<i>", "key.<i>", "value.<i>", heads one after another) are [M, D] float32 with M
            the feature positions of the task, "pooled" is [1, D].
    """

    targets: Targets = field(kw_only=True)
    hidden: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)


def require_same_labels(own: Example, labels: np.ndarray, theirs: np.ndarray) -> None:
    """Refuse a label that an example has here and not in the cache: one id, two things.

    Args:
        own: the student's example.
        labels, theirs: [n] of the same n targets; where one of both has none, nothing is compared.

    Raises:
        MismatchError: names the first that differs.
    """
    if len(labels) != len(theirs):
        found = f"{len(labels)} targets, the cached one {len(theirs)}"
    else:
        wrong = np.flatnonzero((labels != theirs) & (np.minimum(labels, theirs) > UNLABELLED))
        if not len(wrong):
            return
        found = f"label {labels[wrong[0]]}, the cached one {theirs[wrong[0]]}"
    raise MismatchError(
        f"example {own.example_id!r}: has {found}; choose the column that holds the cached ids with"
        " inputs.columns.id, or leave its labels out (inputs.labelled)"
    )
