"""What a student reads: the cache's own examples, or other texts of the same example ids.

    TeacherCache (+ rows and a tokenizer of the student's own) -> Reading -> Selection per split

The teacher may have read English where the student reads Yoruba, or other tokens of the same text;
then the example id alone joins the two, which only a task with one distribution per example allows.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.batches import Collator, Selection
from pipeline.cache import MOST_GROUPS, RowRuns, TeacherCache, group_rows, locate
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.examples import Example
from pipeline.identity import digest_tokenizer, digest_tokenizer_parts
from pipeline.joining import JoinedExamples, load_tokenizer
from pipeline.losses.base import Loss
from pipeline.losses.numbers import NumberLoss
from pipeline.losses.relations import RelationLoss
from pipeline.sources import DataConfig, Rows, load_rows
from pipeline.tasks import TASKS, Task


@dataclass(frozen=True)
class Reading:
    """A cache as one student reads it.

    Attributes:
        cache: what the teacher said.
        task: the cache's task.
        tokenizer: the student's.
        own_rows: the student's own texts, None where it reads the cache's tokens.
        crosses: its class space is not the teacher's; see `crossing`.
    """

    cache: TeacherCache
    task: Task
    tokenizer: Any
    own_rows: list[Example] | None
    crosses: bool = False

    @cached_property
    def _joined(self) -> JoinedExamples:
        assert self.own_rows is not None
        return JoinedExamples(self.cache, self.task, self.own_rows, self.tokenizer)

    def select(self, split: str, without: Collection[str] = ()) -> Selection:
        """The examples of a split that the teacher answered.

        Args:
            without: ids to leave out too, as another teacher did not answer them.

        Raises:
            StillroomError: there is none.
        """
        if self.own_rows is None:
            rows = self.cache.split_indices(split)
            return Selection(self.cache, self.cache.leave_out(rows, without))
        gaps = {*self.cache.skipped, *without}
        found = [
            row
            for row, example in enumerate(self.own_rows)
            if example.columns.get("split") == split and example.example_id not in gaps
        ]
        if not found:
            raise DataError(f"inputs: no example is in split {split!r}; see inputs.splits")
        return Selection(self.own_rows if self.crosses else self._joined, np.array(found))

    @property
    def num_classes(self) -> int:
        """V of the student: the cache's, or that of its own tokenizer."""
        if self.crosses:
            return self.task.num_classes(self.tokenizer)
        return self.cache.manifest.num_classes

    @property
    def teacher_layers(self) -> int:
        """L of the teacher."""
        return count_layers(self.cache)

    def group(self, examples: Selection, column: str) -> dict[str, RowRuns]:
        """The places, in a selection of its examples, of each value of a column.

        Raises:
            StillroomError: the column is not carried, or has too many values.
        """
        if self.own_rows is None:
            chosen = examples.indices
            if not isinstance(chosen, RowRuns):
                chosen = RowRuns.of(chosen)
            return {name: locate(rows, chosen) for name, rows in self.cache.group(column).items()}
        carried = [self.own_rows[index].columns for index in examples.indices]
        if column not in carried[0]:
            raise ConfigError(
                f"inputs: no column {column!r} is carried; add it to inputs.carry"
                f" (there is {', '.join(sorted(carried[0]))})"
            )
        values = pa.array([str(columns[column]) for columns in carried])
        groups = group_rows([values])
        if groups is None:
            raise ConfigError(
                f"inputs: column {column!r} has more than {MOST_GROUPS:,} values; group by one of"
                " few, such as language"
            )
        return groups

    def collator(self, losses: Sequence[Loss]) -> Collator:
        """Joins examples and the hidden-state signals that the losses compare.

        Raises:
            ConfigError: a temperature or signal that is not cached, or one that another text lacks.
        """
        signals: dict[str, str] = {}
        for loss in losses:
            self._check_temperature(loss)
            self._check_positions(loss)
            self._check_vectors(loss)
            self._check_numbers(loss)
            signals |= {name: self._canonical(name) for name in loss.teacher_signals}
        self._require_signals(signals.values())
        manifest = self.cache.manifest
        found = {name: manifest.signals[kept].heads for name, kept in signals.items()}
        heads = {name: count for name, count in found.items() if count is not None}
        pad_id = self.tokenizer.pad_token_id or 0
        return Collator(self.task, pad_id, signals, heads, manifest.positions)

    def widths(self, signals: Mapping[str, str]) -> dict[str, int]:
        """Width of each signal, by the name a loss uses."""
        return {name: self.cache.manifest.signals[kept].width for name, kept in signals.items()}

    def _check_temperature(self, loss: Loss) -> None:
        cached = self.cache.manifest.targets.temperatures
        for wanted in set(loss.temperatures_needed) - set(cached):
            raise ConfigError(
                f"losses: {loss.name} asks for temperature {wanted:g}, {self.cache.path} holds"
                f" {', '.join(f'{t:g}' for t in cached)}; use one of these, or cache the teacher"
                " with it"
            )

    def _check_positions(self, loss: Loss) -> None:
        kept = self.cache.manifest.positions
        if isinstance(loss, RelationLoss) and not loss.pooled and kept in ("first", "last"):
            raise ConfigError(
                f"losses: {loss.name} relates the tokens of a text, {self.cache.path} keeps the"
                f" {kept} one alone; use pooled: true, or cache with hidden.positions: all"
            )

    def _check_vectors(self, loss: Loss) -> None:
        """A task of pooled vectors has nothing else, and a student must keep how it gets them."""
        if not self.task.pooled:
            return
        if loss.unit in ("targets", "labels"):
            raise ConfigError(
                f"losses: {loss.name} compares classes, of which {self.task.name} has none; use"
                " hidden_mse or hidden_cosine with pooled: true"
            )
        if "pooled" in loss.compares and getattr(loss, "projection", "none") != "none":
            raise ConfigError(
                f"losses: {loss.name} learns a projection that the student would not keep; set"
                " projection: none, the student has a dense layer of its own where it needs one"
            )

    def _check_numbers(self, loss: Loss) -> None:
        """Classes and numbers are not compared with one another."""
        numeric = isinstance(loss, NumberLoss)
        if numeric and not self.task.numeric:
            raise ConfigError(
                f"losses: {loss.name} compares numbers, {self.task.name} has none; use it with"
                " sequence-regression"
            )
        if self.task.numeric and not numeric and loss.unit in ("targets", "labels"):
            raise ConfigError(
                f"losses: {loss.name} compares classes, {self.task.name} has numbers; use"
                " output_mse or label_mse"
            )

    def _canonical(self, name: str) -> str:
        """The cached name of a signal that a loss may have counted from the last layer."""
        kind, dot, number = name.partition(".")
        if not dot:
            return name
        layer, total = int(number), self.teacher_layers
        canonical = layer + total + 1 if layer < 0 else layer
        if not 0 <= canonical <= total:
            raise ConfigError(
                f"losses: the teacher has no layer {layer}; it has 0 (embeddings) to {total}"
            )
        return f"{kind}.{canonical}"

    def _require_signals(self, names: Collection[str]) -> None:
        kept = self.cache.manifest.signals
        if missing := sorted(set(names) - set(kept)):
            shown = ", ".join(sorted(kept)) or "none"
            raise ConfigError(
                f"losses: {self.cache.path} has no hidden states"
                f" {', '.join(map(repr, missing))} (it has {shown}); add"
                " them to hidden in the cache's config and cache the teacher again"
            )
        aligned = self.own_rows is None or self.task.features == "targets"
        for name in names:
            if kept[name].per == "feature" and not aligned:
                raise ConfigError(
                    f"losses: {name} is cached per token of the teacher's text, but this student"
                    " reads other tokens; compare pooled vectors instead (pooled: true)"
                )


def open_reading(
    cache: TeacherCache,
    tokenizer: Any,
    inputs: DataConfig | None,
    student_name: str,
    crosses: bool = False,
) -> Reading:
    """Decide what a student reads, and refuse what does not belong together.

    Args:
        tokenizer: the student's own; None for the cache's.
        inputs: other texts of the cached examples; None for the teacher's.
        student_name: for messages.
        crosses: whether no loss reads the teacher's class ids, so that a language model may have
            a tokenizer of its own.

    Raises:
        MismatchError: a task that needs the same tokens, with other ones; other label names.
    """
    manifest = cache.manifest
    task = TASKS[str(manifest.task["name"])].model_validate(manifest.task)
    cached_digest = manifest.identity.tokenizer["digest"]
    same = inputs is None
    if tokenizer is None:
        tokenizer = load_tokenizer(cache)
    elif digest_tokenizer(tokenizer) != cached_digest:
        same = False
        if task.same_tokens and not (crosses and task.shifted and task.segments == "documents"):
            raise MismatchError(_tokenizer_message(cache, tokenizer, student_name))
    if same:
        return Reading(cache, task, tokenizer, None)
    if inputs is not None and task.same_tokens:
        raise ConfigError(
            f"inputs: {task.name} targets belong to the cached tokens; leave inputs out"
        )
    rows = _cached_rows(cache, task) if inputs is None else load_rows(inputs, unique=False)
    names = rows.label_names if isinstance(rows, Rows) else None
    if names not in (None, manifest.label_names) and hasattr(task, "labels"):
        raise MismatchError(
            f"inputs: labels are {', '.join(names or [])}; {cache.path} was cached with"
            f" {', '.join(manifest.label_names or [])}; set inputs.label_names to these"
        )
    carry = [*manifest.columns] if inputs is None else inputs.carry
    own_rows = list(task.examples(rows, tokenizer, carry))
    return Reading(cache, task, tokenizer, own_rows, crosses=task.same_tokens)


def count_layers(cache: TeacherCache) -> int:
    """L of a cache's teacher."""
    return int(str(cache.manifest.identity.teacher["layers"]))


def _cached_rows(cache: TeacherCache, task: Task) -> Iterator[dict[str, Any]]:
    """The cache's own examples as rows, for a student with another tokenizer."""
    for column in task.reads:
        if column not in cache.manifest.columns:
            raise MismatchError(
                f"{cache.path}: carries no {column}, which a student with another tokenizer needs;"
                f" add {column} to data.carry and cache the teacher again, or name the data under"
                " inputs"
            )
    for index in cache.answered:
        yield task.row(cache[int(index)])


def _tokenizer_message(cache: TeacherCache, tokenizer: Any, student_name: str) -> str:
    cached = cache.manifest.identity.tokenizer
    one, other = (digest_tokenizer_parts(t) for t in (load_tokenizer(cache), tokenizer))
    names = ", ".join(sorted(name for name in {*one, *other} if one.get(name) != other.get(name)))
    return (
        f"{cache.path}: cached with tokenizer {str(cached['digest'])[:8]}…"
        f" ({cached['size']:,} ids); {student_name} uses {digest_tokenizer(tokenizer)[:8]}…"
        f" ({len(tokenizer):,} ids), they differ in {names}; cache the teacher again with this"
        " tokenizer, choose a student that shares the teacher's, or a loss that crosses tokenizers:"
        " uld"
    )
