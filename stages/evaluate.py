"""Measure finished runs again: run -> student -> held-out examples of its cache -> metrics."""

from pathlib import Path

import torch

from pipeline.config import load_config
from pipeline.errors import StillroomError
from pipeline.evaluation import measure, score_model
from pipeline.metrics import Metric
from pipeline.runs import read_result
from pipeline.student import load_model
from stages.quiet import quiet_libraries
from stages.train_student import StudentConfig, read_cache


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
    if read_result(run).kind != "student":
        raise StillroomError(f"{run}: is a teacher; its metrics are in {run / 'result.json'}")
    config = load_config(StudentConfig, run / "config.yaml")
    reading = read_cache(config)
    model = load_model(str(run), reading.task, reading.cache.manifest.num_classes)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    held_out = reading.select(split or config.evaluation.split)
    collator = reading.collator([])
    size, tokenizer = config.evaluation.batch_size, reading.tokenizer
    scores = score_model(model, held_out, collator, size, tokenizer=tokenizer)
    return measure(reading.task, scores, config.evaluation.slices)
