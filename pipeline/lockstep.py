"""Several students from one pass over the stream: a batch is read and decoded once for all.

    SharedBatches: rows -> batch, the last one kept    Turns: one student computes at a time
    Seat: both, for one student

Each student trains on a thread of its own, by the trainer that it would have alone. They take
turns, an optimizer step each, with their own random numbers, so that a student's weights are those
it would have had alone. Whether they are at the same step changes what is read twice, nothing else.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from pipeline.batches import Collator, ExampleSource, Selection
from pipeline.errors import ConfigError
from pipeline.examples import Example

Result = TypeVar("Result")
_Batch = dict[str, Any]


class SharedBatches:
    """The training batches of students that read the same rows in the same order.

    Attributes:
        made: batches that were read and decoded so far.
    """

    def __init__(self, keep: int = 1) -> None:
        """Begin with none.

        Args:
            keep: batches that are kept, those of one optimizer step.
        """
        self.made = 0
        self._keep = keep
        self._source: ExampleSource | None = None
        self._plain: Collator | None = None
        self._kept: dict[tuple[int, ...], tuple[list[Example], _Batch, dict[str, _Batch]]] = {}

    def view(self, train: Selection, collator: Collator) -> tuple[Dataset[int], "SharedCollator"]:
        """What a student's loader takes in place of its examples and collator.

        Raises:
            ConfigError: it reads otherwise than the students before it.
        """
        plain = replace(collator, signals={}, heads={})
        if self._plain is None:
            self._source, self._plain = train.source, plain
        elif plain != self._plain:
            raise ConfigError(
                "students trained together must read alike; give them the same cache, inputs and"
                " sampling, or train them one after the other"
            )
        return _RowNumbers(train), SharedCollator(self, collator)

    def read(self, rows: Sequence[int], collator: Collator) -> dict[str, Any]:
        """The batch of some rows, with the hidden states that one student wants."""
        assert self._source is not None and self._plain is not None
        key = tuple(rows)
        if key not in self._kept:
            if len(self._kept) == self._keep:
                del self._kept[next(iter(self._kept))]  # the oldest
            examples = [self._source[row] for row in rows]
            self._kept[key] = examples, self._plain.read_targets(examples), {}
            self.made += 1
        examples, batch, features = self._kept[key]
        for name, signal in collator.signals.items():
            if name not in features:
                features[name] = replace(collator, signals={name: signal}).read_features(examples)
        found = self._plain.read_features(examples)
        for name in collator.signals:
            one = features[name]
            found = {**found, **one, "hidden": {**found["hidden"], **one["hidden"]}}
        return batch | found


class SharedCollator:
    """One student's way into shared batches: from row numbers to a batch."""

    def __init__(self, shared: SharedBatches, collator: Collator) -> None:
        self._shared, self._collator = shared, collator

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        return self._shared.read(rows, self._collator)


class _RowNumbers(Dataset[int]):
    """The rows of a selection themselves, in place of their examples."""

    def __init__(self, train: Selection) -> None:
        self._indices = train.indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> int:
        return int(self._indices[index])


class Turns:
    """Who computes: one thread of several at a time, in a fixed order.

    A thread that fails ends the others with `AbandonedError` at their next turn.
    """

    def __init__(self, count: int) -> None:
        self._condition = threading.Condition()
        self._waiting = list(range(count))
        self._failed = False

    def take(self, player: int) -> None:
        """Wait for this player's first turn."""
        with self._condition:
            self._wait(player)

    def pass_on(self, player: int) -> None:
        """Let the others compute, and come back with the random numbers as they were."""
        state = _random_state()
        with self._condition:
            self._waiting.append(self._waiting.pop(0))
            self._condition.notify_all()
            self._wait(player)
        _restore_random(state)

    def leave(self, player: int, failed: bool) -> None:
        """This player has ended."""
        with self._condition:
            self._failed |= failed
            self._waiting.remove(player)
            self._condition.notify_all()

    def end(self) -> None:
        """Nobody gets another turn."""
        with self._condition:
            self._failed = True
            self._condition.notify_all()

    def _wait(self, player: int) -> None:
        self._condition.wait_for(lambda: self._failed or self._waiting[0] == player)
        if self._failed:
            raise AbandonedError


class AbandonedError(Exception):
    """Another student of the same launch failed."""


class Seat(TrainerCallback):  # type: ignore[misc]
    """One student's place among several: it hands over after each of its optimizer steps.

    Attributes:
        shared: the batches.
        waited: seconds of the others' turns.
    """

    def __init__(self, shared: SharedBatches, turns: Turns, player: int) -> None:
        self.shared, self.waited = shared, 0.0
        self._turns, self._player = turns, player

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        self._turns.pass_on(self._player)
        self.waited += time.perf_counter() - began


def run_in_turns(jobs: Sequence[Callable[[Seat], Result]], keep: int = 1) -> list[Result]:
    """Run jobs on a thread each, one computing at a time; each hands over by its seat.

    Args:
        keep: batches of an optimizer step.

    Raises:
        Exception: of the first job that failed; the others were ended at their next turn, as all
            are by an interrupt.
    """
    shared, turns = SharedBatches(keep), Turns(len(jobs))
    results: dict[int, Result] = {}
    errors: list[Exception] = []

    def play(player: int) -> None:
        failed = True
        try:
            turns.take(player)
            results[player] = jobs[player](Seat(shared, turns, player))
            failed = False
        except AbandonedError:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            turns.leave(player, failed)

    threads = [
        threading.Thread(target=copy_context().run, args=(play, player), daemon=True)
        for player in range(len(jobs))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt, of which no other thread hears
        turns.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        raise errors[0]
    return [results[player] for player in range(len(jobs))]


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
