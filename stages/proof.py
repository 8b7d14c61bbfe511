"""Does distillation help? Students of several recipes over several seeds, in one table.

    trial: teacher -> cache -> students x seeds -> runs/proof -> mean, standard deviation, distance

Each trial's first student is the baseline, which mostly learns from labels alone. The distance is
that of the means on the trial's first metric, in pooled standard deviations of single runs; below
two nothing is claimed. Seeds change the student's weights and order, never the teacher or the
labels. Whatever stands is kept, so that an interrupted proof continues.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import typer

from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.runs import Result, read_result
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.shipped import find_config
from stages.train_student import StudentConfig, train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher

_CERTAIN = 2.0  # standard deviations


@dataclass(frozen=True)
class Trial:
    """A comparison of students.

    Attributes:
        students: names of shipped configs; the first is the baseline.
        caches: names of shipped configs, made before.
        teacher: name of a shipped config, None where the teacher is there.
        metrics: name -> whether higher is better; the first decides.
        slices: "column=value" whose mean is reported in place of the whole, where there are any.
        overrides: of the students' configs.
        encoder: the setting of the teacher's or the caches' configs that names MiniLM, which
            `--teacher` replaces; None where another teacher is used.
    """

    students: Sequence[str]
    caches: Sequence[str]
    teacher: str | None
    metrics: Mapping[str, bool]
    slices: Sequence[str] = ()
    overrides: Sequence[str] = ()
    encoder: str | None = None


_LOW_RESOURCE = tuple(
    f"language={name}"
    for name in (
        *("yor_Latn", "hau_Latn", "ibo_Latn", "amh_Ethi", "zul_Latn", "wol_Latn"),
        *("npi_Deva", "mlt_Latn", "gle_Latn", "tat_Cyrl", "quy_Latn", "swh_Latn"),
    )
)
_CLASSES = {"accuracy": True, "macro_f1": True, "loss": False, "ece": False}
_MINILM = "model.model"
TRIALS: dict[str, Trial] = {
    # Longer than the demo: past the early plateau, where chance decides which student leaves first.
    "language-model": Trial(
        ("demo-labels", "demo-kd", "demo-kd-hidden", "demo-kd-wide"),
        ("demo",),
        None,
        {"loss": False, "agreement": True, "kl_to_teacher": False, "ece": False},
        overrides=(
            "training.max_steps=800",
            "training.per_device_train_batch_size=16",
            "training.warmup_steps=100",
            "evaluation.every=100",
        ),
    ),
    "losses": Trial(
        (
            *("demo-labels", "demo-kd", "demo-bucket", "demo-rs-kd", "demo-renormalised"),
            *("demo-dense", "demo-skew-kl"),
        ),
        ("demo", "demo-draws", "demo-dense"),
        None,
        {"loss": False, "agreement": True, "ece": False},
    ),
    "topics": Trial(
        ("sib200-labels", "sib200-kd", "sib200-kd-pooled"),
        ("sib200",),
        "sib200",
        _CLASSES,
        _LOW_RESOURCE,
        encoder=_MINILM,
    ),
    "topics-unseen": Trial(
        ("sib200-labels-unseen", "sib200-kd-unseen"),
        ("sib200",),
        "sib200",
        _CLASSES,
        _LOW_RESOURCE,
        encoder=_MINILM,
    ),
    "topics-english": Trial(
        (
            *("sib200-english-labels", "sib200-hinton", "sib200-pkd", "sib200-minilmv2"),
            *("sib200-tinybert", "sib200-xtremedistil", "sib200-relations"),
        ),
        ("sib200-features",),
        "sib200",
        _CLASSES,
        encoder=_MINILM,
    ),
    "tags": Trial(
        ("ud-labels", "ud-kd", "ud-kd-hidden", "ud-staged"),
        ("ud",),
        "ud",
        _CLASSES,
        encoder=_MINILM,
    ),
    "questions": Trial(
        ("xquad-labels", "xquad-kd"),
        ("xquad",),
        "xquad",
        {"f1": True, "exact_match": True},
        encoder=_MINILM,
    ),
    "embeddings": Trial(
        ("tatoeba-bert", "tatoeba-bag"),
        ("tatoeba",),
        None,
        {"retrieval_to_source": True, "retrieval_from_source": True, "cosine": True},
        encoder="teacher.model",
    ),
    "translation": Trial(
        ("flores-labels", "flores-kd", "flores-sequences", "flores-sequences-kd"),
        ("flores", "flores-generated"),
        "flores",
        {"chrf": True, "bleu": True, "loss": False},
    ),
}


def prove(
    trial: Trial, seeds: Sequence[int], folder: Path, encoder: Path | None = None
) -> dict[str, list[Result]]:
    """Train a trial's students once per seed and return their results by student.

    Args:
        encoder: a local copy of MiniLM; None for the hub's.

    Raises:
        StillroomError: what a teacher, a cache or a student found wrong.
    """
    local = [] if encoder is None or trial.encoder is None else [f"{trial.encoder}={encoder}"]
    if trial.teacher is not None:
        path = find_config("teacher", trial.teacher)
        train_teacher(load_config(TrainTeacherConfig, path, local))
        local = []
    for name in trial.caches:
        cache_teacher(load_config(CacheConfig, find_config("cache", name), local))
    found: dict[str, list[Result]] = {name: [] for name in trial.students}
    for seed in seeds:
        for name in trial.students:
            output = folder / f"{name}-{seed}"
            overrides = [f"output={output}", f"seed={seed}", *trial.overrides]
            train_student(load_config(StudentConfig, find_config("student", name), overrides))
            found[name].append(read_result(output))
    return found


def tabulate(trial: Trial, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Rows of a Markdown table: mean ± standard deviation, and the distance from the baseline."""
    main, baseline = next(iter(trial.metrics)), trial.students[0]
    lines = [
        f"| student | {' | '.join(trial.metrics)} | distance from {baseline} |",
        f"|---|{'---|' * (len(trial.metrics) + 1)}",
    ]
    values = {name: _values(results, main, trial.slices) for name, results in found.items()}
    for name, results in found.items():
        cells = [_show(_values(results, metric, trial.slices)) for metric in trial.metrics]
        gap = ""
        if name != baseline and len(results) > 1:
            gained = distance(values[baseline], values[name], trial.metrics[main])
            gap = f"{gained:+.1f} sd" + ("" if abs(gained) >= _CERTAIN else ": not told apart")
        lines.append(f"| {name} | {' | '.join(cells)} | {gap} |")
    return lines


def distance(baseline: Sequence[float], other: Sequence[float], higher: bool = False) -> float:
    """How much better the mean is, in pooled standard deviations of single runs."""
    pooled = ((stdev(baseline) ** 2 + stdev(other) ** 2) / 2) ** 0.5
    better = fmean(other) - fmean(baseline) if higher else fmean(baseline) - fmean(other)
    return better / pooled if pooled else float("inf")


def _show(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _values(results: Sequence[Result], metric: str, slices: Sequence[str]) -> list[float]:
    """One value for each seed, the mean over the slices where there are any."""
    found = []
    for result in results:
        parts = [result.metric(metric, name) for name in slices or ("all",)]
        known = [value for value in parts if value is not None]
        if known:
            found.append(fmean(known))
    return found


def main(
    trials: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(TRIALS)}; all where left out.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/proof"),
    teacher: Annotated[
        Path | None, typer.Option(help="A folder of MiniLM; the hub's where left out.")
    ] = None,
) -> None:
    """Print a table for each trial; one whose data is not here is named and left out."""
    for name in trials or TRIALS:
        if name not in TRIALS:
            raise ConfigError(f"trial {name!r} is not known{did_you_mean(name, TRIALS)}")
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
            found = prove(TRIALS[name], numbers, folder, teacher)
        except DataError as error:
            print(f"\n{name}: left out ({error})")
            continue
        print("\n".join(("", f"{name}:", "", *tabulate(TRIALS[name], found))))


if __name__ == "__main__":
    typer.run(main)
