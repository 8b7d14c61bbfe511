"""The seam of the losses: what a loss sees, and what every loss is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from pipeline.config import StrictModel
from pipeline.heads import OutputHead
from pipeline.targets import Targets

Unit = Literal["targets", "labels", "features", "examples"]


@dataclass(frozen=True)
class StudentOutputs:
    """What the student said, at the positions of a batch that count.

    Attributes:
        logits: [N, V'] at the target positions, V' >= V (rows beyond V are padding of the head).
        hidden: signal -> vectors, only those that some loss asked for, by the name that it used
            ("layer.-1" stays so): "layer.<i>" -> [M, D] at the feature positions, 0 the embeddings;
            "pooled" -> [B, D], the student's sentence vector; "query.<i>", "key.<i>", "value.<i>"
            -> [M, heads, width], what the attention inside layer i is computed from.
    """

    logits: Tensor
    hidden: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Knowledge:
    """What the teacher and the labels say, aligned row by row with `StudentOutputs`.

    Attributes:
        targets: N positions; None where a model learns from labels alone without a cache.
        label_ids: [N] int64, UNLABELLED (-100) where there is no label.
        hidden: as the student's, of the teacher's width (whoever fills this in resolves "layer.-1"
            against the cache).
        documents: [M] int64, ascending: feature positions whose tokens see one another have one
            number. None where no loss asked for such a signal.
        example_keys: [B] int64, one number for each example id. None where no loss asked for
            pooled vectors.
        shares: a factor on each value of a loss by its unit, [n]; nothing for 1. What a term is
            divided by does not change with them.
        numbers: [N, V] what the data of a regression give, nan where nothing; None for classes.
        others: the same of further teachers, by name.
        rows: which of the micro-batch's N positions these are.
    """

    targets: Targets | None
    label_ids: Tensor
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Tensor | None = None
    example_keys: Tensor | None = None
    shares: Mapping[Unit, Tensor] = field(default_factory=dict)
    others: Mapping[str, "Knowledge"] = field(default_factory=dict)
    numbers: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def of(self, teacher: str | None) -> "Knowledge":
        """That of a further teacher, or this one."""
        return self if teacher is None else self.others[teacher]


class Schedule(StrictModel):
    """A weight that changes over training: linear from `start` to `end`, over the given share of
    steps.

    Constant at `start` before `begin` and at `end` after `until` (both in [0, 1] of all steps).
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def at(self, progress: float) -> float:
        """The weight at progress in [0, 1]."""
        span = max(self.until - self.begin, 1e-12)
        share = min(max((progress - self.begin) / span, 0.0), 1.0)
        return self.start + (self.end - self.start) * share


class WarmupStableDecay(StrictModel):
    """A weight that rises from `start` to `peak`, stays, and falls to `end` (WSD, Hu et al. 2024).

    Linear on both sides: up over the first `warmup` of all steps, down over the last `decay` (both
    in [0, 1], and together at most 1).
    """

    peak: float
    start: float = 0.0
    end: float = 0.0
    warmup: float = Field(default=0.0, ge=0.0, le=1.0)
    decay: float = Field(default=0.1, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        if self.warmup + self.decay > 1.0:
            raise ValueError("warmup and decay take more than all steps; make one of them shorter")
        return self

    def at(self, progress: float) -> float:
        """The weight at progress in [0, 1]."""
        if progress < self.warmup:
            return self.start + (self.peak - self.start) * progress / self.warmup
        left = 1.0 - progress
        if left < self.decay:
            return self.end + (self.peak - self.end) * left / self.decay
        return self.peak


def _kind_of_weight(value: Any) -> str:
    if isinstance(value, Mapping):
        return "WarmupStableDecay" if "peak" in value else "Schedule"
    return type(value).__name__ if isinstance(value, StrictModel) else "float"


Weight = Annotated[
    Annotated[float, Tag("float")]
    | Annotated[Schedule, Tag("Schedule")]
    | Annotated[WarmupStableDecay, Tag("WarmupStableDecay")],
    Discriminator(_kind_of_weight),  # so that a complaint is about the one that was meant
]


class Loss(StrictModel, ABC):
    """A member of the family: its own configuration, one value per position, no reduction.

    The trainer sums the values and divides by the number of valid units of the whole optimizer
    step, over all micro-batches and ranks; `unit` says which count that is, and `weights` how much
    each of them counts.

    Attributes:
        weight: of the term in the total.
        teacher: the further teacher it listens to; None for the first one.
    """

    name: str
    weight: Weight = 1.0
    teacher: str | None = None

    def weight_at(self, progress: float) -> float:
        """The weight at progress in [0, 1] of training."""
        return self.weight if isinstance(self.weight, float) else self.weight.at(progress)

    def at(self, progress: float) -> Self:
        """The loss as it is at progress in [0, 1] of training; before that it is at its start."""
        return self

    def resolve(self, student_layers: int, teacher_layers: int) -> Self:
        """The same with every layer by its number, once it is known how many the two have.

        Raises:
            ConfigError: a rule for choosing layers that does not fit these depths.
        """
        return self

    def hear(self, read_head: Callable[[], OutputHead]) -> Self:
        """The same with the teacher's output head, where it needs that.

        Args:
            read_head: reads it from the cache, or says that none is kept.
        """
        return self

    def name_classes(self, names: Sequence[str] | None) -> Self:
        """The same with every class by its id.

        Args:
            names: of the V classes in order; None where they have none.

        Raises:
            ConfigError: a class that does not exist.
        """
        return self

    @property
    @abstractmethod
    def unit(self) -> Unit:
        """What is counted: target positions, those with a label, feature positions, or examples."""

    def weights(self, knowledge: Knowledge) -> Tensor | None:
        """How much each unit position counts, [n], 0 where it is not valid; None for 1 each.

        Its values have them as a factor already.
        """
        return None

    @property
    def needs_all_logits(self) -> bool:
        """Whether it needs the logits of all classes at once, which a fused head never holds."""
        return False

    @property
    def temperatures_needed(self) -> Sequence[float]:
        """The cached temperatures it reads, beside T = 1, which is always cached."""
        return ()

    @property
    def gradient_scale(self) -> float:
        """A factor in its values that belongs to the gradient; logged terms are without it."""
        return 1.0

    @property
    def reads_teacher(self) -> bool:
        """Whether it learns from a teacher, not from labels alone."""
        return self.unit != "labels"

    @property
    def compares(self) -> Mapping[str, str]:
        """Student signal -> teacher signal that it is compared with, see `StudentOutputs.hidden`;
        empty for a loss of logits."""
        return {}

    @property
    def crosses_tokenizers(self) -> bool:
        """Whether it reads no class ids of a teacher, whose class space may then be another."""
        return not self.reads_teacher

    @property
    def teacher_signals(self) -> tuple[str, ...]:
        """The teacher's signals that it reads; see `compares`."""
        return tuple(self.compares.values())

    def projections(self, student_width: int, teacher_width: int) -> nn.ModuleDict:
        """Learned parameters of the loss, trained beside the student and left out of its export."""
        return nn.ModuleDict()

    @abstractmethod
    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return one value per unit position, [n] float32, 0 where it is not valid.

        Args:
            student: the student's outputs.
            knowledge: the teacher's targets and the labels at the same positions.
            projections: what `projections()` returned, after training so far.
        """
