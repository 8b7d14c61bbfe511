"""What a report is made of: finished runs, their teachers, and what their caches cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics import Metric
from pipeline.runs import Result

LABEL_LOSSES = frozenset({"cross_entropy"})  # losses that never ask a teacher


@dataclass(frozen=True)
class RunReport:
    """A finished run.

    Attributes:
        label: its name in tables and legends, unique within a comparison.
        result: what it reached.
        curve: the lines of its metrics file, in order.
    """

    label: str
    result: Result
    curve: Sequence[Mapping[str, Any]] = ()

    @property
    def is_student(self) -> bool:
        """Whether it was trained as a student; a teacher's own run is shown among the teachers."""
        return self.result.kind == "student"

    @property
    def is_distilled(self) -> bool:
        """Whether any loss it was trained with asks the teacher."""
        names = {loss.get("name") for loss in self.result.losses if loss.get("weight") != 0}
        return self.is_student and bool(names - LABEL_LOSSES)

    @property
    def parameters(self) -> int | None:
        """How many parameters the model has, where the result says."""
        return self.result.model.get("parameters")


@dataclass(frozen=True)
class TeacherReport:
    """A teacher, measured on the same held-out examples as its students.

    Attributes:
        name: of its folder, or on the hub.
        parameters: where known.
        metrics: on the whole and on those slices whose column its cache carries.
        details: the task's extra findings, as in a student's result.
    """

    name: str
    parameters: int | None
    metrics: Sequence[Metric]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in tables and sentences, where students have names too."""
        return label_teacher(self.name)


@dataclass(frozen=True)
class CacheReport:
    """What one cache cost.

    Attributes:
        path: where it lies.
        digest: of its manifest; a run names the cache it was trained from by this.
        examples: how many the teacher read.
        tokens: input tokens the teacher read.
        targets: positions whose distribution is kept.
        capture_seconds: all of stage one, from the first batch to the last byte.
        forward_seconds: the teacher's forward passes alone, where they were measured.
        bytes: on disk.
        column_bytes: the same by column, where known.
    """

    path: str
    digest: str
    examples: int
    tokens: int
    targets: int
    capture_seconds: float
    forward_seconds: float | None
    bytes: int
    column_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs of one task side by side.

    Attributes:
        runs: in the order of the table.
        teachers: the distinct teachers of these runs; more than one where caches differ.
        caches: those that are still there.
        notes: what a reader must know before comparing, one sentence each.
    """

    runs: Sequence[RunReport]
    teachers: Sequence[TeacherReport] = ()
    caches: Sequence[CacheReport] = ()
    notes: Sequence[str] = ()

    @property
    def task(self) -> str:
        """The task that all runs share."""
        return self.runs[0].result.task

    @property
    def students(self) -> list[RunReport]:
        """The runs that are students."""
        return [run for run in self.runs if run.is_student]


def label_teacher(name: str) -> str:
    """A teacher's name, with the word where the name does not say it."""
    return name if "teacher" in name.lower() else f"teacher {name}"
