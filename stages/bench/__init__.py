"""Speed and size, each beside its baseline, measured in one run on one machine.

    teacher, standard library -- speed --> caches, rows -- storage --> rows -> table, JSON

Every part is the real one: a capture is `cache_teacher`, a step is the DistillationTrainer's. What
it is held against is in `baselines`; both sides of a ratio are run in turn (`measuring`).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from pipeline.errors import StillroomError
from pipeline.runs import write_json
from stages.bench.codecs import list_points, measure_codecs, show_points
from stages.bench.goals import codec_rows, largest_space, scale_rows, show_goals
from stages.bench.hidden import list_choices, measure_choices, show_choices
from stages.bench.losses import measure_losses, measure_vocabularies
from stages.bench.measuring import describe_machine, show_columns, show_rows
from stages.bench.plot import draw_plot
from stages.bench.setting import QUICK, BenchConfig, Setting, prepare
from stages.bench.spaces import list_sources, train_languages
from stages.bench.speed import measure_capture, measure_training
from stages.bench.storage import measure_reading, measure_sizes
from stages.bench.stores import measure_stores
from stages.bench.stream import measure_stream, show_scale
from stages.quiet import quiet_libraries

VERSION = 1
Found = TypeVar("Found")


@quiet_libraries()
def bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Measure everything, print it, and return what was written to `config.output`.

    Raises:
        StillroomError: the teacher or the disk does not allow it.
    """
    machine = describe_machine()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.output.parent) as scratch:
        setting = prepare(config, Path(scratch))
        console.print(_describe_setting(setting, machine))
        clock = _Clock(console)
        rows = clock.time("stage one", partial(measure_capture, setting))
        rate = rows[0].measured
        rows += clock.time("student steps", partial(measure_training, setting, capture_rate=rate))
        rows += clock.time("losses", partial(measure_losses, setting))
        rows += clock.time("vocabularies", partial(measure_vocabularies, setting))
        sizes, columns = clock.time("sizes", partial(measure_sizes, setting))
        rows += sizes
        rows += clock.time("reads", partial(measure_reading, setting))
        streams, scale = clock.time("streams", partial(measure_stream, setting))
        rows += streams + scale_rows(scale)
        rows += clock.time("object stores", partial(measure_stores, setting))
        clock.time("models for codecs", partial(train_languages, config))
        sources, points = clock.time("codecs", partial(measure_codecs, setting))
        rows += codec_rows(sources, points)
        choices = clock.time("hidden states", partial(measure_choices, setting))
        content = {
            "version": VERSION,
            "machine": machine,
            "trained_teacher": setting.trained,
            "tokens": setting.tokens,
            "config": config.model_dump(mode="json"),
            "seconds": clock.seconds,
            "rows": [row.to_json() for row in rows],
            "columns": columns,
            "spaces": list_sources(sources),
            "codecs": list_points(points),
            "scale": scale,
            "hidden": list_choices(choices),
        }
    show_rows(rows, "measured", console)
    known = [row.reached for row in rows if row.goal]
    console.print(f"{sum(map(bool, known))} of {len(known)} goals reached\n", highlight=False)
    show_columns(columns, console)
    show_scale(scale, console)
    show_choices(choices, console)
    show_points(points, largest_space(sources), console)
    show_goals(sources, points, console)
    write_json(config.output, content)
    picture = config.output.with_suffix(".svg")
    picture.write_text(draw_plot(points, largest_space(sources)), encoding="utf-8")
    console.print(f"{config.output} and {picture.name}: written", soft_wrap=True)
    return content


class _Clock:
    """Tells what is measured, and how long it took."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    def time(self, what: str, run: Callable[[], Found]) -> Found:
        """Run one part of the bench."""
        self._console.print(f"measuring {what} ... ", end="")
        began = time.perf_counter()
        found = run()
        self.seconds[what] = time.perf_counter() - began
        self._console.print(f"{self.seconds[what]:.0f} s", highlight=False)
        return found


def parse_arguments(arguments: Sequence[str] | None = None) -> BenchConfig:
    """The command line as a config; --quick takes less text and fewer repetitions."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.bench", description="Speed and size, each beside its baseline."
    )
    parser.add_argument("--quick", action="store_true", help="less text, fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    given = parser.parse_args(arguments)
    changes: dict[str, Any] = dict(QUICK) if given.quick else {}
    if given.json is not None:
        changes["output"] = given.json
    return BenchConfig(**changes)


def main() -> None:
    """The command; what a user can mend becomes one line and exit code 1."""
    try:
        bench(parse_arguments(), Console())
    except StillroomError as error:
        raise SystemExit(f"error: {error}") from None


def _describe_setting(setting: Setting, machine: dict[str, Any]) -> str:
    origin = (
        f"{setting.config.teacher}"
        if setting.trained
        else f"one step of its recipe, because {setting.config.teacher} is not there: times hold,"
        " bytes per token need the trained one"
    )
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    return (
        f"teacher: {origin}; {setting.model.dtype}, {setting.tokens:,} tokens of"
        f" {setting.config.files} files in blocks of {setting.config.block_size}\n{facts}"
    )
