"""The command `stillroom`: one subcommand per stage, errors a user can mend in one line.

A CONFIG is a YAML file, or the name of one that is shipped (for instance `demo`).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import StillroomError
from stages import cache_commands, run_commands
from stages.shipped import find_config

_LONGEST = 4000  # letters of an error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run the teacher once, keep what it said, train any number of students from it.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]
Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config.")]


# Stages are imported when they are run: transformers takes seconds to import.


@app.command("cache-teacher")
def cache_teacher_command(
    config: Config,
    set_: Overrides = None,
    share: Annotated[
        bool, typer.Option("--share", help="Any number of processes, here or elsewhere, at once.")
    ] = False,
    shard_range: Annotated[
        str | None, typer.Option(metavar="A:B", help="Shards A up to B alone; others take others.")
    ] = None,
) -> None:
    """Run the teacher once over a data set and keep its targets.

    Example: stillroom cache-teacher demo --set targets.top_k=32
    """
    from pipeline.config import load_config
    from stages.cache_teacher import CacheConfig, cache_teacher

    parsed = load_config(CacheConfig, find_config("cache", config), set_ or [])
    cache_teacher(parsed, share=share, shard_range=shard_range)


@app.command("train-student")
def train_student_command(
    configs: Annotated[list[str], typer.Argument(help="YAML files, or names of shipped configs.")],
    set_: Overrides = None,
    together: Annotated[
        bool, typer.Option("--together", help="In one pass over the cache: decode once for all.")
    ] = False,
) -> None:
    """Train one student after the other, each from the cache its config names.

    Example: stillroom train-student demo-labels demo-kd --set seed=1
    """
    from pipeline.config import load_config
    from stages.train_student import StudentConfig, train_student
    from stages.train_together import train_together

    parsed = [
        load_config(StudentConfig, find_config("student", config), set_ or []) for config in configs
    ]
    for run in train_together(parsed) if together else map(train_student, parsed):
        _report(run)


@app.command("train-tasks")
def train_tasks_command(config: Config, set_: Overrides = None) -> None:
    """Train one student on several tasks: a shared encoder, a head and a cache for each.

    Example: stillroom train-tasks tasks.yaml --set tasks.topics.share=2
    """
    from pipeline.config import load_config
    from stages.train_tasks import TasksConfig, train_tasks

    for run in train_tasks(load_config(TasksConfig, find_config("tasks", config), set_ or [])):
        _report(run)


@app.command("train-teacher")
def train_teacher_command(config: Config, set_: Overrides = None) -> None:
    """Train or fine-tune a teacher from labels.

    Example: stillroom train-teacher demo --set output=data/teachers/mine --set seed=1
    """
    from pipeline.config import load_config
    from stages.train_teacher import TrainTeacherConfig, train_teacher

    _report(
        train_teacher(load_config(TrainTeacherConfig, find_config("teacher", config), set_ or []))
    )


app.command("evaluate")(run_commands.evaluate_command)
app.command("compare")(run_commands.compare_command)
app.command("export")(run_commands.export_command)


@app.command("import")
def import_command(config: Config, set_: Overrides = None) -> None:
    """Make a cache of a dump: DistillKit, axolotl, vLLM, OpenAI, SGLang, our own plain files.

    Example: stillroom import distillkit --set tokenizer=data/teachers/mine
    """
    from pipeline.config import load_config
    from stages.import_dump import import_dump
    from stages.import_reading import ImportConfig

    import_dump(load_config(ImportConfig, find_config("import", config), set_ or []))


@app.command("rounds")
def rounds_command(config: Config, set_: Overrides = None) -> None:
    """Let students become teachers: self-distillation, or several students taking turns.

    Example: stillroom rounds born-again --set rounds=3
    """
    from pipeline.config import load_config
    from stages.rounds import RoundsConfig, run_rounds

    parsed = load_config(RoundsConfig, find_config("rounds", config), set_ or [])
    print(f"report: {run_rounds(parsed)}")


@app.command("sweep")
def sweep_command(
    config: Config,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Try every combination of these; repeatable."),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW:HIGH[:log]", help="Let Optuna look here, or among A,B; repeatable."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs of a search.")] = 20,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    metric: Annotated[str, typer.Option(help="What the runs are ordered by.")] = "loss",
    slice: Annotated[str, typer.Option(help="Where it is measured: column=value.")] = "all",
    set_: Overrides = None,
) -> None:
    """Train one student under many settings from one cache, and compare what comes of it.

    Example: stillroom sweep demo-kd --grid losses.0.weight=0.5,0.9 --jobs 2
    """
    from stages.search import make_proposer
    from stages.sweep import Sweep, sweep

    plan = Sweep(find_config("student", config), set_ or [], metric, slice, jobs)
    proposer = make_proposer(grid or [], search or [], trials, plan.student().seed, jobs > 1)
    print(f"report: {sweep(plan, proposer)}")


app.command("inspect")(cache_commands.inspect_command)
app.command("verify")(cache_commands.verify_command)
app.command("select")(cache_commands.select_command)
app.command("filter")(cache_commands.filter_command)
app.command("merge")(cache_commands.merge_command)
app.command("extend")(cache_commands.extend_command)
app.command("add-signal")(cache_commands.add_signal_command)


def main() -> None:
    """Entry point: a StillroomError becomes one line and exit code 1."""
    _guarded(app)


def _guarded(run: Callable[[], None]) -> None:
    try:
        run()
    except Exception as found:
        from stages.disk import tell_of_disk

        error = tell_of_disk(found)
        if not isinstance(error, StillroomError):
            raise
        from pipeline.report.text import show_running

        # A message may quote what strangers wrote, which must not reach a terminal as it is.
        line = show_running(" ".join(str(error).split()))
        print(f"error: {line[:_LONGEST]}{'…' * (len(line) > _LONGEST)}", file=sys.stderr)
        raise SystemExit(1) from None


def _report(run: Path) -> None:
    from pipeline.runs import read_result

    (run / "result.json").stat()  # it stood a moment ago: the disk is to blame if it is gone
    result = read_result(run)
    shown = ", ".join(
        f"{m.name} {m.value:.4g}{m.unit if m.unit == '%' else ''}"
        for m in result.metrics
        if m.slice == "all"
    )
    print(f"{run}: {shown} ({result.training['seconds']:.0f} s of training)")


if __name__ == "__main__":
    main()
