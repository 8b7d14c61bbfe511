"""A teacher's answers into a cache, shard by shard, the model never waiting for the disk.

    Spool -- plan_batches --> task.batch -> Teacher.capture, on one thread per worker
          -- in order --> Background -> ShardWriter

A shard is the unit of work: what is asked together and which random numbers are drawn depend on the
seed and the shard alone, so an interrupted capture continues and leaves the same bytes. On a CPU
every core asks a batch of its own; a GPU is asked by one thread, which runs ahead of it.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from pipeline.cache import CacheWriter
from pipeline.cache.checksums import sum_files
from pipeline.cache.documents import read_json, write_sealed
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


@dataclass
class CaptureLog:
    """What a capture took, over all its sessions; kept in capture.json, out of the manifest.

    Attributes:
        path: capture.json.
        teacher_files: see `describe_files`; tells whether the teacher was touched since.
        sessions: one dict per session: seconds (all, from the first batch to the last byte),
            forward_seconds (the model alone, its head included, the mean over the workers), tokens,
            targets, examples, bytes (of the cache so far), device, dtype, workers, threads (of
            all workers together), libraries (see `list_libraries`).
    """

    path: Path
    teacher_files: dict[str, Any]
    sessions: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, teacher_files: dict[str, Any] | None = None) -> "CaptureLog":
        """Read what stands, nothing where there is no file.

        Args:
            path: capture.json.
            teacher_files: those of a new session, in place of the recorded ones.

        Raises:
            CacheError: it is damaged.
        """
        raw = read_json(path) if path.is_file() else {}
        recorded = raw.get("teacher_files", {})
        files = recorded if teacher_files is None else teacher_files
        return cls(path, files, raw.get("sessions", []))

    def total(self, name: str) -> float:
        """The sum of a number over the sessions."""
        return float(sum(session[name] for session in self.sessions))

    def save(self) -> None:
        """Write the sessions and their sums, and the checksum of the config they ran with."""
        times = {name: self.total(name) for name in ("seconds", "forward_seconds")}
        counts = {name: int(self.total(name)) for name in ("tokens", "targets", "examples")}
        last = self.sessions[-1]
        kept = {name: last[name] for name in ("bytes", "device", "dtype", "workers", "threads")}
        content = {**times, **counts, **kept, "sessions": self.sessions}
        content["files"] = sum_files(self.path.parent, "config.yaml", "teacher.json")
        write_sealed(self.path, {**content, "teacher_files": self.teacher_files})

    def summarise(self, cache: Path, size: int) -> str:
        """One line about a finished capture of `size` bytes."""
        seconds, tokens = max(self.total("seconds"), 1e-9), max(self.total("tokens"), 1.0)
        share = 100.0 * self.total("forward_seconds") / seconds
        return (
            f"{cache}: {self.total('examples'):,.0f} examples, {tokens:,.0f} tokens in"
            f" {seconds:,.1f} s ({tokens / seconds:,.0f} tokens/s, {share:.0f} % of it the"
            f" teacher's forward pass), {size / 1e6:,.1f} MB, {size / tokens:.0f} B/token"
        )


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
        log: told after every shard.
        require_place: called before a shard is committed; raises where another process took over.
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
    log: CaptureLog
    require_place: Callable[[], None]
    progress: Callable[[int, int], None]

    def run(self) -> None:
        """Capture every shard that does not stand yet.

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

        with (
            one_thread_each(self.workers > 1),
            Background(_Sink(self, session).write, self._depth()) as background,
        ):
            for answer in map_in_order(ask, self._questions(), self.workers):
                background.put(answer)
                tokens = sum(len(example.input_ids) for example in answer.captured.batch)
                self.progress(tokens, session["bytes"])

    def _questions(self) -> Iterator["_Question"]:
        """The batches of all shards that do not stand yet, shard by shard."""
        draft = self.writer.draft
        for index in range(draft.num_shards):
            if index in self.writer.finished:
                continue
            first, size = index * draft.shard_examples, draft.shard_size(index)
            batches = plan_batches(self.examples.lengths[first : first + size], self.batch_tokens)
            for number, rows in enumerate(batches):
                examples = [self.examples[first + row] for row in rows]
                yield _Question(index, number, rows, examples)

    def _ask(self, teacher: Teacher, question: "_Question") -> "_Answer":
        seed = batch_seed(self.seed, question.shard, question.number)
        batch = self.make_batch(question.examples)
        captured = teacher.capture(
            batch.inputs,
            batch.target_index,
            batch.feature_index,
            batch.examples,
            self.spec,
            torch.Generator(teacher.device).manual_seed(seed),
        )
        return _Answer(question.shard, question.rows, captured)

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
        }
        self.log.sessions.append(session)
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
    captured: Captured


class _Sink:
    """Runs on the writer's thread: writes the answers of a shard in order, as soon as it can."""

    def __init__(self, capture: Capture, session: dict[str, Any]) -> None:
        self._capture = capture
        self._session = session
        self._began = time.perf_counter()

    def write(self, answers: Iterator[_Answer]) -> None:
        """Write every shard of the answers; those of one follow each other."""
        for index, group in groupby(answers, lambda answer: answer.shard):
            tokens = targets = 0
            with self._capture.writer.shard(index) as shard:
                for example in _in_order(group):
                    tokens += len(example.input_ids)
                    targets += len(example.targets)
                    shard.add(example)
                self._capture.require_place()
            self._note(index, tokens, targets)

    def _note(self, index: int, tokens: int, targets: int) -> None:
        capture, session = self._capture, self._session
        session["examples"] += capture.writer.draft.shard_size(index)
        session["tokens"] += tokens
        session["targets"] += targets
        session["bytes"] = capture.writer.bytes_written
        session["forward_seconds"] = capture.teacher.forward.seconds / capture.workers
        session["seconds"] = time.perf_counter() - self._began
        capture.log.save()


def _in_order(answers: Iterable[_Answer]) -> Iterator[CachedExample]:
    """The examples of one shard by their row; only those that came too early wait in memory."""
    waiting: dict[int, CachedExample] = {}
    row = 0
    for answer in answers:
        waiting |= zip(answer.rows, answer.captured.examples(), strict=True)
        while row in waiting:
            yield waiting.pop(row)
            row += 1


def list_libraries() -> dict[str, str]:
    """Versions of the packages whose code makes numbers and tokens."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers")}


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
