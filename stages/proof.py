"""Does distillation win on the demo? Every student over several seeds, as a table for the README.

    demo's configs x seeds -> runs/proof/<student>-<seed> -> mean, standard deviation, distance

The distance is that of the means from learning from labels, in pooled standard deviations of single
runs. Finished runs are kept, so that an interrupted proof continues.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import typer

from pipeline.config import load_config
from pipeline.runs import Result, read_result
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.cli import find_config
from stages.train_student import StudentConfig, train_student

BASELINE = "labels"
STUDENTS = (BASELINE, "kd", "kd-hidden", "kd-wide")
# Longer than the demo: past the early plateau, where chance decides which student leaves it first.
LONGER = (
    "training.max_steps=800",
    "training.per_device_train_batch_size=16",
    "training.warmup_steps=100",
    "evaluation.every=100",
)
METRICS = ("loss", "agreement", "kl_to_teacher", "ece")


def prove(seeds: Sequence[int], folder: Path) -> dict[str, list[Result]]:
    """Train the demo's students once per seed and return their results by student."""
    cache_teacher(load_config(CacheConfig, find_config("cache", "demo")))
    found: dict[str, list[Result]] = {name: [] for name in STUDENTS}
    for seed in seeds:
        for name in STUDENTS:
            output = folder / f"{name}-{seed}"
            overrides = [f"output={output}", f"seed={seed}", *LONGER]
            path = find_config("student", f"demo-{name}")
            train_student(load_config(StudentConfig, path, overrides))
            found[name].append(read_result(output))
    return found


def tabulate(found: dict[str, list[Result]]) -> list[str]:
    """Rows of a Markdown table: mean ± standard deviation, and the distance on held-out loss."""
    lines = [
        f"| student | {' | '.join(METRICS)} | distance from labels |",
        f"|---|{'---|' * (len(METRICS) + 1)}",
    ]
    losses = {name: _values(results, "loss") for name, results in found.items()}
    for name, results in found.items():
        cells = []
        for metric in METRICS:
            values = _values(results, metric)
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}")
        gap = "" if name == BASELINE else f"{distance(losses[BASELINE], losses[name]):.1f} sd"
        lines.append(f"| {name} | {' | '.join(cells)} | {gap} |")
    return lines


def distance(baseline: Sequence[float], other: Sequence[float]) -> float:
    """(mean of the baseline - mean of the other) in pooled standard deviations of single runs."""
    pooled = ((stdev(baseline) ** 2 + stdev(other) ** 2) / 2) ** 0.5
    return (fmean(baseline) - fmean(other)) / pooled if pooled else float("inf")


def _values(results: Sequence[Result], metric: str) -> list[float]:
    values = [result.metric(metric) for result in results]
    return [value for value in values if value is not None]


def main(
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/proof"),
) -> None:
    """Print the README's table."""
    print("\n".join(tabulate(prove([int(seed) for seed in seeds.split(",")], folder))))


if __name__ == "__main__":
    typer.run(main)
