"""A teacher's answers into a cache, shard by shard, the model never waiting for the disk.

    Spool -- plan_batches --> task.batch -> Teacher.capture, on one thread per worker
          -- in order --> Background -> ShardWriter

A shard is the unit of work: what is asked together and which random numbers are drawn depend on the
seed and the shard alone, so an interrupted capture continues and leaves the same bytes. On a CPU
every core asks a batch of its own; a GPU is asked by one thread, which runs ahead of it.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from pipeline.cache import CacheWriter
from pipeline.cache.shard_writer import ShardWriter
from pipeline.cache.sharing import Shards
from pipeline.cache.signals.hidden import OutgrownError
from pipeline.capture_log import CaptureLog, list_libraries
from pipeline.errors import CacheError
from pipeline.examples import CachedExample, Example
from pipeline.tasks.base import Batch
from pipeline.teacher import (
    Background,
    Captured,
    CaptureSpec,
    Spool,
    Teacher,
    map_in_order,
    one_thread_each,
)

_WAITING_BYTES = 1 << 28  # answers that may wait for the disk


@dataclass(frozen=True)
class Capture:
    """One session of a capture.

    Attributes:
        teacher: answers.
        examples: waiting on disk.
        writer: takes the answers; its draft says what a shard is.
        make_batch: the task's batching.
        spec: what is kept.
        batch_tokens: tokens of a batch at most, padding included; a longer example goes alone.
        workers: batches that are asked at a time.
        seed: of the tail draws.
        shards: those that are to be written.
        log: told after every shard.
        unfit: why the teacher is not asked about an example, None where it is.
        lenient: whether an example that it could not answer is skipped.
        progress: told the tokens of every batch that was asked, and the bytes that are safe.
    """

    teacher: Teacher
    examples: Spool
    writer: CacheWriter
    make_batch: Callable[[Sequence[Example]], Batch]
    spec: CaptureSpec
    batch_tokens: int
    workers: int
    seed: int
    shards: Shards
    log: CaptureLog
    unfit: Callable[[Example], str | None]
    lenient: bool
    progress: Callable[[int, int], None]

    def run(self) -> None:
        """Capture every shard that is wanted and does not stand yet.

        Raises:
            StillroomError: what the teacher or the writer found wrong; finished shards are safe.
        """
        session = self._begin_session()
        self.log.save()  # before the first shard: what a session wrote is never without its record
        idle: SimpleQueue[Teacher] = SimpleQueue()
        for twin in (self.teacher, *(self.teacher.twin() for _ in range(self.workers - 1))):
            idle.put(twin)

        def ask(question: _Question) -> _Answer:
            teacher = idle.get()
            try:
                return self._ask(teacher, question)
            finally:
                idle.put(teacher)

        sink = _Sink(self, session)
        with one_thread_each(self.workers > 1):
            for _ in self.shards.rounds():
                with Background(sink.write, self._depth()) as background:
                    for answer in map_in_order(ask, self._questions(), self.workers):
                        background.put(answer)
                        self.progress(answer.tokens, session["bytes"])

    def _questions(self) -> Iterator["_Question"]:
        """The batches of all shards that can be had now, shard by shard."""
        draft = self.writer.draft
        for index in self.shards.take():
            first, size = index * draft.shard_examples, draft.shard_size(index)
            batches = plan_batches(self.examples.lengths[first : first + size], self.batch_tokens)
            for number, rows in enumerate(batches):
                examples = [self.examples[first + row] for row in rows]
                yield _Question(index, number, rows, examples)

    def _ask(self, teacher: Teacher, question: "_Question") -> "_Answer":
        tokens = sum(len(example.input_ids) for example in question.examples)
        unfit: dict[int, tuple[Example, str]] = {}
        asked: dict[int, Example] = {}
        for row, example in zip(question.rows, question.examples, strict=True):
            if (reason := self.unfit(example)) is not None:
                unfit[row] = example, reason
            else:
                asked[row] = example
        captured = self._capture(teacher, question, list(asked.values())) if asked else None
        return _Answer(question.shard, list(asked), captured, unfit, tokens)

    def _capture(
        self, teacher: Teacher, question: "_Question", examples: Sequence[Example]
    ) -> Captured:
        seed = batch_seed(self.seed, question.shard, question.number)
        batch = self.make_batch(examples)
        return teacher.capture(
            batch.inputs,
            batch.target_index,
            batch.feature_index,
            batch.examples,
            self.spec,
            torch.Generator(teacher.device).manual_seed(seed),
        )

    def _depth(self) -> int:
        per_batch = self.batch_tokens * bytes_per_token(self.spec, self.teacher.width)
        return min(16, max(2, _WAITING_BYTES // per_batch))

    def _begin_session(self) -> dict[str, Any]:
        device = self.teacher.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        session = {
            "seconds": 0.0,
            "forward_seconds": 0.0,
            "tokens": 0,
            "targets": 0,
            "examples": 0,
            "bytes": self.writer.bytes_written,
            "device": name,
            "dtype": str(self.teacher.model.dtype).removeprefix("torch."),
            "workers": self.workers,
            "threads": torch.get_num_threads(),
            "libraries": list_libraries(),
            "session": self.shards.session,
        }
        self.log.begin(session)
        return session


@dataclass(frozen=True)
class _Question:
    """One batch of a shard: which of its rows, and the examples."""

    shard: int
    number: int
    rows: Sequence[int]
    examples: Sequence[Example]


@dataclass(frozen=True)
class _Answer:
    """The answers to some rows of a shard, on their way."""

    shard: int
    rows: Sequence[int]
    captured: Captured | None
    unfit: Mapping[int, tuple[Example, str]]
    tokens: int

    def examples(self, lenient: bool) -> dict[int, tuple[Example, str | None]]:
        """By row: what was answered, or what could not be asked, with the reason."""
        found: dict[int, tuple[Example, str | None]] = dict(self.unfit)
        if self.captured is not None:
            answered = self.captured.examples(lenient)
            found |= {row: (one, None) for row, one in zip(self.rows, answered, strict=True)}
        return found


class _Sink:
    """Runs on the writer's thread: writes the answers of a shard in order, as soon as it can."""

    def __init__(self, capture: Capture, session: dict[str, Any]) -> None:
        self._capture = capture
        self._session = session
        self._began = time.perf_counter()

    def write(self, answers: Iterator[_Answer]) -> None:
        """Write every shard of the answers; those of one follow each other."""
        capture = self._capture
        for index, group in groupby(answers, lambda answer: answer.shard):
            capture.shards.require(index)  # what others left of it is removed at once
            try:
                with capture.writer.shard(index) as shard:
                    counts = self._fill(shard, group)
                    capture.shards.require(index)  # it is sealed now, or sent
            except OutgrownError:
                if not capture.lenient:
                    raise
                capture.shards.put_back(index)  # whose vectors these are is known next time
            except CacheError:
                capture.shards.require(index)  # that it was taken over may be why
                raise
            else:
                self._note(index, *counts)
                capture.shards.give_back(index)

    def _fill(self, shard: ShardWriter, answers: Iterator[_Answer]) -> tuple[int, int]:
        """Add every example of a shard; its tokens and targets."""
        tokens = targets = 0
        for example, reason in _in_order(answers, self._capture.lenient):
            tokens += len(example.input_ids)
            if isinstance(example, CachedExample):
                targets += len(example.targets)
                shard.add(example, self._capture.lenient)
            else:
                shard.skip(example, str(reason))
        return tokens, targets

    def _note(self, index: int, tokens: int, targets: int) -> None:
        capture, session = self._capture, self._session
        session["examples"] += capture.writer.draft.shard_size(index)
        session["tokens"] += tokens
        session["targets"] += targets
        session["bytes"] = capture.writer.bytes_written
        session["forward_seconds"] = capture.teacher.forward.seconds / capture.workers
        session["seconds"] = time.perf_counter() - self._began
        capture.log.save()


def _in_order(answers: Iterable[_Answer], lenient: bool) -> Iterator[tuple[Example, str | None]]:
    """The examples of one shard by their row; only those that came too early wait in memory."""
    waiting: dict[int, tuple[Example, str | None]] = {}
    row = 0
    for answer in answers:
        waiting |= answer.examples(lenient)
        while row in waiting:
            yield waiting.pop(row)
            row += 1


def plan_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of similar length together, as many as fit with their padding; the longest first.

    Args:
        lengths: tokens of each row.
        tokens: rows times the longest of them may not exceed this, except for one row alone.
    """
    batches: list[list[int]] = []
    width = 0
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches


def batch_seed(seed: int, shard: int, number: int) -> int:
    """The seed of the draws of a shard's batch, [0, 2^63)."""
    digest = hashlib.blake2b(f"{seed}/{shard}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def bytes_per_token(spec: CaptureSpec, width: int) -> int:
    """What one answer takes in memory, at most."""
    entries = 12 * (spec.top_k + spec.tail_draws) + 4 * len(spec.temperatures) + 24
    return entries + spec.hidden_bytes(width)
