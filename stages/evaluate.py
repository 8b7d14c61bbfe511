"""Measure finished runs again: run -> student -> held-out examples of its cache -> metrics."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.config import load_config
from pipeline.errors import CacheError, StillroomError
from pipeline.evaluation import measure, score_model
from pipeline.lineage import describe_lineage, require_same_lineage
from pipeline.metrics import Metric
from pipeline.reading import Reading
from pipeline.runs import read_result
from pipeline.student import load_model
from stages.quiet import quiet_libraries
from stages.train_student import StudentConfig, read_cache


@dataclass(frozen=True)
class FinishedRun:
    """A finished student: its config, and its cache as it reads it."""

    folder: Path
    config: StudentConfig
    reading: Reading

    def load(self, folder: Path | None = None) -> PreTrainedModel:
        """The student in evaluation mode and float32, from its own folder or another one."""
        classes = self.reading.num_classes
        return load_model(str(folder or self.folder), self.reading.task, classes).eval()

    def measure(self, model: nn.Module, split: str | None = None) -> list[Metric]:
        """The metrics of a model on a split, by default that of the run's own metrics."""
        evaluation = self.config.evaluation
        scores = score_model(
            model,
            self.reading.select(split or evaluation.split),
            self.reading.collator([]),
            evaluation.batch_size,
            tokenizer=self.reading.tokenizer,
        )
        return measure(self.reading.task, scores, evaluation.slices)


def open_run(run: Path) -> FinishedRun:
    """Open a finished student's run.

    Raises:
        StillroomError: no finished run, no student, or its cache is gone, or another one.
    """
    if read_result(run).kind != "student":
        raise StillroomError(f"{run}: is a teacher; its metrics are in {run / 'result.json'}")
    config = load_config(StudentConfig, run / "config.yaml")
    if not config.cache.exists():
        raise CacheError(
            f"{run}: its cache {config.cache} is not there; bring it back, or run the student's"
            " config again with --set cache=PLACE (tasks.NAME.cache of several tasks), which keeps"
            " it as it is"
        )
    reading = read_cache(config)
    require_same_lineage(run, describe_lineage(reading))
    return FinishedRun(run, config, reading)


@quiet_libraries()
def evaluate(run: Path, split: str | None = None, device: str = "auto") -> list[Metric]:
    """Measure a finished student on a split of the cache it was trained from.

    Args:
        run: the run's folder.
        split: train, validation or test; the one of its config where left out.
        device: "auto" takes a GPU where there is one.

    Raises:
        StillroomError: no finished run, no student, or its cache is gone.
    """
    opened = open_run(run)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return opened.measure(opened.load().to(device), split)
