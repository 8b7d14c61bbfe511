"""The curve of a run, <run>/metrics.jsonl, while it is written: one line for each log.

logs of transformers -> line -> file; after an interruption -> cut back to the last checkpoint
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from pipeline.storage import rewriting


@dataclass(frozen=True)
class Curve:
    """Where the lines go, and what was before them.

    Attributes:
        path: of the file.
        stage: the stage's name, in each line; None in a training of one stage.
        steps, epochs: of the stages before, from which those of this one count on.
    """

    path: Path
    stage: str | None = None
    steps: int = 0
    epochs: float = 0.0

    @property
    def next_epoch(self) -> int:
        """The first epoch that no stage before has begun."""
        return ceil(self.epochs - 1e-6)

    def append(self, step: int, epoch: float, seconds: float, logs: Mapping[str, float]) -> None:
        """Write a line of training losses or of held-out metrics; any other log is left out.

        Args:
            step, epoch: of this stage.
            seconds: of training so far, all stages.
            logs: as transformers gives them, held-out metrics by the prefix `eval_`.
        """
        held_out = any(key.startswith("eval_") for key in logs)
        if not held_out and "loss" not in logs:
            return  # the closing summary of transformers, in no unit of ours
        line = {
            "step": self.steps + step,
            "epoch": self.epochs + epoch,
            "split": "eval" if held_out else "train",
            **({"stage": self.stage} if self.stage else {}),
            "seconds": seconds,
            **{key.removeprefix("eval_"): logs[key] for key in logs if key != "epoch"},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut(self, last_step: int | None) -> float:
        """Drop the lines that will be written again; return the seconds of the last one kept.

        Args:
            last_step: of this stage, the last that was saved; None where it begins anew.
        """
        if not self.path.is_file():
            return 0.0
        kept, seconds = [], 0.0
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # cut off
            values = json.loads(line)
            if values.get("stage") == self.stage and (
                last_step is None or values["step"] > self.steps + last_step
            ):
                continue
            kept.append(line)
            seconds = values["seconds"]
        with rewriting(self.path) as draft:  # never half of what is kept
            draft.write_bytes("".join(kept).encode())
        return seconds
