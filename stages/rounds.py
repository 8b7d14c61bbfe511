"""Students that become teachers: self-distillation in rounds, or several students taking turns.

    teacher -> cache -> student 1 -> cache -> student 2 -> ... -> comparison

With one student each round's is the teacher of the next one (born-again networks, Furlanello et
al. 2018). With two or more they take turns, each learning from the one before it: mutual
distillation (Zhang et al. 2018) in alternating rounds. Every turn is an ordinary cache and an
ordinary run, so an interrupted loop continues where it was and a finished turn is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.config import StrictModel, parse_config
from pipeline.storage import Folder
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.compare import compare
from stages.train_student import StudentConfig, train_student


@dataclass(frozen=True)
class Turn:
    """One student's lesson: the cache it learns from, and its run."""

    cache: CacheConfig
    student: StudentConfig


class RoundsConfig(StrictModel):
    """A loop of stage one and stage two.

    Attributes:
        output: the folder; caches are below `caches`, runs below `runs`.
        rounds: how often each student has its turn.
        cache: a cache's config without `output`; its teacher is the first one.
        students: students' configs by name, without `cache` and `output`, in the order of turns.
        warm: from its second turn on a student begins with its own last weights; else every turn
            begins as its config says.
    """

    output: Folder
    rounds: int = Field(default=2, ge=1)
    cache: dict[str, Any]
    students: dict[str, dict[str, Any]] = Field(min_length=1)
    warm: bool = False

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        list(self.turns())  # what is wrong with any of them is said before the first
        return self

    def turns(self) -> Iterator[Turn]:
        """All turns in order.

        Raises:
            ConfigError: a setting of a cache or a student that does not fit.
        """
        teacher: Mapping[str, Any] = self.cache.get("teacher", {})
        for number in range(1, self.rounds + 1):
            for name, student in self.students.items():
                turn = f"{name}-{number}"
                folder, run = self.output / "caches" / turn, self.output / "runs" / turn
                told = {**student, "cache": str(folder), "output": str(run)}
                if self.warm and number > 1:
                    last = self.output / "runs" / f"{name}-{number - 1}"
                    told["student"] = {"from": "pretrained", "model": str(last)}
                asked = {**self.cache, "output": str(folder), "teacher": teacher}
                yield Turn(
                    parse_config(CacheConfig, asked, "cache"),
                    parse_config(StudentConfig, told, f"students.{name}"),
                )
                teacher = {**self.cache.get("teacher", {}), "model": str(run), "revision": None}


def run_rounds(config: RoundsConfig) -> Path:
    """Run every turn that does not stand yet; return the report that compares all students.

    Raises:
        StillroomError: what a turn's cache or student found wrong.
    """
    runs = []
    for turn in config.turns():
        cache_teacher(turn.cache)
        runs.append(train_student(turn.student))
    return compare(runs, config.output / "report.html")
