"""The curve of a run, <run>/metrics.jsonl, while it is written: one line for each log.

logs of transformers -> line -> file; after an interruption -> cut back to the last checkpoint
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """Where the lines go."""

    path: Path

    def append(self, step: int, epoch: float, seconds: float, logs: Mapping[str, float]) -> None:
        """Write a line of training losses or of held-out metrics; any other log is left out.

        Args:
            seconds: of training so far.
            logs: as transformers gives them, held-out metrics by the prefix `eval_`.
        """
        held_out = any(key.startswith("eval_") for key in logs)
        if not held_out and "loss" not in logs:
            return  # the closing summary of transformers, in no unit of ours
        line = {
            "step": step,
            "epoch": epoch,
            "split": "eval" if held_out else "train",
            "seconds": seconds,
            **{key.removeprefix("eval_"): value for key, value in logs.items()},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut(self, last_step: int) -> float:
        """Drop the lines after a step; return the seconds of the last one that is kept."""
        if not self.path.is_file():
            return 0.0
        kept, seconds = [], 0.0
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # cut off
            values = json.loads(line)
            if values["step"] <= last_step:
                kept.append(line)
                seconds = values["seconds"]
        self.path.write_text("".join(kept), encoding="utf-8")
        return seconds
