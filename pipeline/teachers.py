"""Further teachers beside the one that a student's cache is from: what they said of the same ids.

examples of a batch -- id --> each further cache -- align --> targets, hidden states, shares

A loss is taken for each teacher on its own and the values are added, weighted by the teachers'
shares. For forward KL that has the gradient of learning from the mixture of the teachers, and no
class that one of them kept must be known from the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.batches import Collator
from pipeline.cache import TeacherCache
from pipeline.cache.record_batch import join_targets
from pipeline.config import StrictModel
from pipeline.errors import ConfigError, MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.joining import load_tokenizer
from pipeline.losses.base import Loss, Unit
from pipeline.reading import Reading
from pipeline.storage import Location
from pipeline.targets import Targets
from pipeline.tasks import Task


class TeacherShare(StrictModel):
    """A further teacher and how much it counts; the first one counts 1.

    Attributes:
        cache: its finished cache, of the same example ids.
        weight: everywhere.
        by, weights: times this for examples whose column `by` has the value; 1 for others.
    """

    cache: Location
    weight: float = Field(default=1.0, ge=0.0)
    by: str | None = None
    weights: dict[str, float] = Field(default={})

    @model_validator(mode="after")
    def _check_column(self) -> Self:
        if (self.by is None) != (not self.weights):
            raise ValueError("by (a column) and weights (of its values) belong together")
        return self


class FurtherTeachers(StrictModel):
    """The section `further_teachers` of a student's config.

    Attributes:
        caches: the teachers by name.
        combine: "fixed" takes the weights as they are; "confidence" shares their sum at each
            position in proportion to weight times the probability of a teacher's first choice.
    """

    caches: dict[str, TeacherShare] = Field(min_length=1)
    combine: Literal["fixed", "confidence"] = "fixed"

    def open(self) -> dict[str, TeacherCache]:
        """The caches by name.

        Raises:
            CacheError: one is not there, or not finished.
        """
        return {name: TeacherCache.open(share.cache) for name, share in self.caches.items()}

    def expand(self, losses: Sequence[Loss]) -> list[Loss]:
        """Each loss that reads a teacher once for every teacher, unless it names one itself.

        Raises:
            ConfigError: a loss names a teacher that is none.
        """
        found: list[Loss] = []
        for loss in losses:
            if loss.teacher is not None and loss.teacher not in self.caches:
                known = ", ".join(self.caches)
                raise ConfigError(
                    f"losses: {loss.name} names the teacher {loss.teacher!r}; further_teachers are"
                    f" {known}, and the first one has no name"
                )
            found.append(loss)
            if loss.teacher is None and loss.reads_teacher:
                found += [loss.model_copy(update={"teacher": name}) for name in self.caches]
        return found


@dataclass(frozen=True)
class Member:
    """A further teacher as one student reads it."""

    name: str
    share: TeacherShare
    reading: Reading
    collator: Collator

    @cached_property
    def _teacher_tokenizer(self) -> Any:
        return load_tokenizer(self.reading.cache)

    def ask(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What it said of these examples: `targets`, and `hidden` with what belongs to it."""
        said = [self._ask(example) for example in examples]
        batch = self.collator.read_features(said)
        return {"targets": join_targets(said), **batch}

    def weigh(self, examples: Sequence[Example]) -> Tensor:
        """Its weight for each example, [B]."""
        found = torch.full((len(examples),), self.share.weight)
        if self.share.by is not None:
            values = [str(example.columns.get(self.share.by)) for example in examples]
            found *= torch.tensor([self.share.weights.get(value, 1.0) for value in values])
        return found

    def _ask(self, example: Example) -> CachedExample:
        reading = self.reading
        said = reading.cache.by_id(example.example_id)
        if not reading.task.same_tokens:
            own = Example(**{f.name: getattr(example, f.name) for f in fields(Example)})
            joined = reading.task.align(own, said, reading.tokenizer, self._teacher_tokenizer)
            if len(joined.target_positions) < len(example.target_positions):
                raise MismatchError(
                    f"{reading.cache.path}: speaks of fewer targets of example"
                    f" {example.example_id!r} than the student's cache; cache both teachers with"
                    " the same data and a task.max_length that cuts neither"
                )
            return joined
        same = (
            said.input_ids.tolist() == example.input_ids.tolist()
            and said.target_positions.tolist() == example.target_positions.tolist()
        )
        if not same:
            raise MismatchError(
                f"{reading.cache.path}: read other tokens of example {example.example_id!r} than"
                " the student's cache; cache both teachers from the same data and task"
            )
        return said


@dataclass(frozen=True)
class Company:
    """All further teachers of a student; a `Collator` asks them.

    Attributes:
        combine: see `FurtherTeachers`.
        members: in the order of the config.
    """

    combine: Literal["fixed", "confidence"]
    members: tuple[Member, ...]

    def ask(self, examples: Sequence[Example], first: Targets) -> dict[str, Any]:
        """What is added to a batch: `teachers` by name, and the `shares` of the first one.

        Args:
            first: what the first teacher said.
        """
        said = {member.name: member.ask(examples) for member in self.members}
        weights = [torch.ones(len(examples)), *(m.weigh(examples) for m in self.members)]
        counts = torch.tensor([len(example.target_positions) for example in examples])
        shares = torch.stack([weight.repeat_interleave(counts) for weight in weights])
        if self.combine == "confidence":
            trust = [first.confidence(), *(s["targets"].confidence() for s in said.values())]
            trusted = shares * torch.stack(trust)
            shares = trusted * shares.sum(dim=0) / trusted.sum(dim=0).clamp(min=1e-30)
        collator = self.members[0].collator
        features = collator.task.count_features(examples, collator.positions)
        found = [_spread(share, counts, features) for share in shares]
        for part, share in zip(said.values(), found[1:], strict=True):
            part["shares"] = share
        return {"teachers": said, "shares": found[0]}


def make_company(
    section: FurtherTeachers, first: Reading, caches: Mapping[str, Any], losses: Sequence[Loss]
) -> Company:
    """The further teachers of a student.

    Args:
        first: the student's cache as it reads it.
        caches: the opened further caches by name.
        losses: all terms, of which each takes those of its teacher.

    Raises:
        MismatchError: a cache of another task, class space, tokenizer or other positions.
        ConfigError: a temperature or signal that a cache does not have.
    """
    members = []
    for name, share in section.caches.items():
        _require_alike(first.cache, caches[name], first.task)
        same = _tokenizer_digest(first.cache) == _tokenizer_digest(caches[name])
        own_rows = first.own_rows if same or first.own_rows is not None else []
        reading = replace(first, cache=caches[name], own_rows=own_rows)
        mine = [loss for loss in losses if loss.teacher == name]
        members.append(Member(name, share, reading, reading.collator(mine)))
    return Company(section.combine, tuple(members))


def _require_alike(first: TeacherCache, other: TeacherCache, task: Task) -> None:
    facts = ["num_classes", "label_names", "positions"]
    if task.same_tokens:
        facts.append("shifted")
        if _tokenizer_digest(first) != _tokenizer_digest(other):
            raise MismatchError(
                f"{other.path}: cached with another tokenizer than {first.path}, but {task.name}"
                " needs the same tokens of both; cache this teacher with that tokenizer"
            )
    if first.manifest.task["name"] != other.manifest.task["name"]:
        raise MismatchError(
            f"{other.path}: holds targets of {other.manifest.task['name']}, {first.path} of"
            f" {task.name}; teachers of one student need one task"
        )
    for fact in facts:
        mine, theirs = getattr(first.manifest, fact), getattr(other.manifest, fact)
        if mine != theirs:
            raise MismatchError(
                f"{other.path}: its {fact} is {theirs}, that of {first.path} is {mine}; cache both"
                " teachers with the same data and settings"
            )


def _tokenizer_digest(cache: TeacherCache) -> object:
    return cache.manifest.identity.tokenizer["digest"]


def _spread(share: Tensor, counts: Tensor, features: Tensor) -> dict[Unit, Tensor]:
    """Shares of N targets as those of every unit; an example's is the mean of its targets'."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    sums = torch.zeros(len(counts)).index_add_(0, owner, share)
    examples = sums / counts.clamp(min=1)
    return {
        "targets": share,
        "labels": share,
        "features": examples.repeat_interleave(features),
        "examples": examples,
    }
