"""The command `stillroom`: one subcommand per stage, errors a user can mend in one line.

A CONFIG is a YAML file, or the name of one that is shipped (for instance `demo`).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import ConfigError, StillroomError
from pipeline.storage import as_path
from stages import cache_commands
from stages.shipped import find_config

CONFIGS = Path(__file__).parent / "configs"
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
Runs = Annotated[list[Path], typer.Argument(help="Folders of runs, or a folder that holds runs.")]


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


@app.command("evaluate")
def evaluate_command(
    runs: Runs,
    split: Annotated[str | None, typer.Option(help="train, validation or test.")] = None,
) -> None:
    """Measure finished students again on held-out examples of their cache.

    Example: stillroom evaluate runs/demo/kd --split test
    """
    from pipeline.report.text import show_running
    from stages.evaluate import evaluate

    for run in runs:
        table = Table("metric", "value", "unit", "slice", title=str(run))
        for metric in evaluate(run, split):
            table.add_row(
                metric.name, f"{metric.value:.4g}", metric.unit, Text(show_running(metric.slice))
            )
        Console().print(table)


@app.command("compare")
def compare_command(
    runs: Runs,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report.html"),
) -> None:
    """Compare finished runs in a table and in one self-contained HTML page.

    Example: stillroom compare runs/demo --output runs/demo/report.html
    """
    from stages.compare import compare

    print(f"report: {compare(runs, output)}")


@app.command("export")
def export_command(
    source: Annotated[
        Path, typer.Argument(parser=as_path, help="The folder of a finished student, or a cache.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="transformers, int8, onnx or sentence-transformers; parquet or jsonl of a cache."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where it goes; RUN/exports/FORMAT or CACHE.FORMAT where left out."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights of a transformers folder: bfloat16, float16.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="What is measured: train, validation or test.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the student, for its card: apache-2.0, ...")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Send it to the hub under this name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a new repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: list what would be sent.")
    ] = False,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Of a cache: the hidden states too.")
    ] = False,
) -> None:
    """Write a finished student in a form to deploy, or a cache as a plain file.

    Example: stillroom export runs/demo/kd --format int8
    """
    from stages.export import export, print_export, publish
    from stages.export_cache import export_cache, is_cache

    console = Console()
    if is_cache(source):
        given = {"--dtype": dtype, "--split": split, "--licence": licence, "--push": push}
        _refuse_options(f"{source} is a cache", {name for name, value in given.items() if value})
        export_cache(source, format or "parquet", output, hidden, console)
        return
    _refuse_options(f"{source} is no cache", {"--hidden"} if hidden else set())
    done = export(source, format or "transformers", output, dtype, split, licence, push)
    print_export(done, console)
    if push is not None:
        publish(done.folder, push, private, dry_run, console)


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


def _refuse_options(why: str, given: set[str]) -> None:
    if given:
        raise ConfigError(f"{why}; leave out {', '.join(sorted(given))}")


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

    result = read_result(run)
    shown = ", ".join(
        f"{m.name} {m.value:.4g}{m.unit if m.unit == '%' else ''}"
        for m in result.metrics
        if m.slice == "all"
    )
    print(f"{run}: {shown} ({result.training['seconds']:.0f} s of training)")


if __name__ == "__main__":
    main()
