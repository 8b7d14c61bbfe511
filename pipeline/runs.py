"""A run: the folder of one trained model, its curve and, written last, its result.

<run>/
  config.yaml         the resolved config
  identity.json       digests of what it learns from
  metrics.jsonl       one line per log: {"step": ..., "split": "train"|"eval", "<name>": value, ...}
                      and "stage" where there are several
  config.json, model.safetensors, tokenizer files, README.md     what from_pretrained opens
  tensorboard/        where training.report_to asks for it
  checkpoints/        while it trains
  locks/              who trains it, see `pipeline.locking`; gone when nobody does
  result.json         written last: where it stands, the run is whole
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import CacheError, StillroomError, did_you_mean
from pipeline.metrics import DIRECTIONS, Metric
from pipeline.storage import is_local, write_bytes

RESULT = "result.json"
RESULT_VERSION = 1


@dataclass(frozen=True)
class Result:
    """What a run was, took and reached.

    Attributes:
        name: shown in tables; the last part of the folder's name unless the config says otherwise.
        kind: "student" or "teacher".
        task: the task's name.
        config: the resolved config.
        identity: digests of what it was trained on; for a student `cache` (manifest digest) and
            what else `describe_lineage` tells.
        model: architecture name, parameters (count), layers, hidden_size where known.
        training: steps, epochs, examples_seen, tokens_seen, seconds (training only), device,
            threads.
        metrics: on the held-out split, for the whole and per slice.
        details: the task's extra findings, for instance a confusion matrix; shown as they are.
    """

    name: str
    kind: str
    task: str
    config: Mapping[str, Any]
    identity: Mapping[str, str]
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    metrics: list[Metric]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> list[Mapping[str, Any]]:
        """The terms it was trained with, those of all stages."""
        everywhere = self.config.get("losses") or []
        stages = self.config.get("stages") or [{}]
        return [loss for stage in stages for loss in stage.get("losses") or everywhere]

    def metric(self, name: str, slice: str = "all") -> float | None:
        """The value of a metric on a slice, None where it was not measured."""
        for metric in self.metrics:
            if metric.name == name and metric.slice == slice:
                return metric.value
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file so that it is there whole or not at all."""
    write_bytes(path, _dump(value))


def write_result(run: Path, result: Result) -> None:
    """Write <run>/result.json, which makes the run whole.

    Raises:
        FileNotFoundError: the folder has no config.yaml, so it is not the one that was begun.
    """
    content = _dump({"version": RESULT_VERSION, **asdict(result)})
    write_bytes(run / RESULT, content, beside=run / "config.yaml")


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_result(run: Path) -> Result:
    """Read <run>/result.json.

    Raises:
        StillroomError: the folder is no finished run.
    """
    path = run / RESULT
    if not run.is_dir():
        siblings = [p.name for p in run.parent.iterdir()] if run.parent.is_dir() else []
        hint = did_you_mean(run.name, siblings) if siblings else "; train it first"
        raise StillroomError(f"{run}: no such run{hint}")
    if not path.is_file():
        raise StillroomError(
            f"{run}: has no result.json, so the run is not finished; run its train command again"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("version", None)
        if version == RESULT_VERSION:
            return _parse_result(raw)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StillroomError(
            f"{path}: makes no sense ({' '.join(str(error).split())[:200]}); train the run again"
        ) from error
    raise StillroomError(
        f"{path}: version {version}, expected {RESULT_VERSION}; train the run again"
    )


def _parse_result(raw: Mapping[str, Any]) -> Result:
    """A result, if every part is of its kind: the folder may come from anybody."""
    metrics = [Metric(**metric) for metric in raw["metrics"]]
    for metric in metrics:
        told = (metric.name, metric.unit, metric.direction, metric.slice)
        if not all(isinstance(text, str) for text in told):
            raise ValueError(f"metric {metric.name!r}")
        if not isinstance(metric.value, int | float) or metric.direction not in DIRECTIONS:
            raise ValueError(f"metric {metric.name!r}")
    result = Result(**{**raw, "metrics": metrics})
    texts = (result.name, result.kind, result.task)
    parts = (result.config, result.identity, result.model, result.training, result.details)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its name, kind and task are texts")
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("its config, identity, model, training and details are objects")
    return result


def require_no_run(folder: Path) -> None:
    """Refuse a folder for a cache or a view that a run has already: both write a config.yaml.

    Raises:
        CacheError: a run, finished or under way, stands there.
    """
    for name in (RESULT, "identity.json", "checkpoints"):
        if is_local(folder) and (folder / name).exists():
            raise CacheError(f"{folder}: holds a run ({name}); choose another output")


def read_curve(run: Path) -> list[dict[str, Any]]:
    """The lines of <run>/metrics.jsonl, in order; empty where there is none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
