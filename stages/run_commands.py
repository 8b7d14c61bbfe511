"""The commands about finished students, as `stages.cli` registers them: measure, compare, export.

A cache is exported by the same command.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import ConfigError
from pipeline.storage import as_folder, as_path

Runs = Annotated[
    list[Path],
    typer.Argument(parser=as_folder, help="Folders of runs, or a folder that holds runs."),
]


def evaluate_command(
    runs: Runs,
    split: Annotated[str | None, typer.Option(help="train, validation or test.")] = None,
) -> None:
    """Measure finished students again on held-out examples of their cache.

    Example: stillroom evaluate runs/demo/kd --split test
    """
    from pipeline.report.text import show_running
    from stages.compare import find_runs
    from stages.evaluate import evaluate

    for run in find_runs(runs).finished:
        table = Table("metric", "value", "unit", "slice", title=str(run))
        for metric in evaluate(run, split):
            table.add_row(
                metric.name, f"{metric.value:.4g}", metric.unit, Text(show_running(metric.slice))
            )
        Console().print(table)


def compare_command(
    runs: Runs,
    output: Annotated[Path, typer.Option(parser=as_folder, help="Where the report goes.")] = Path(
        "report.html"
    ),
) -> None:
    """Compare finished runs in a table and in one self-contained HTML page.

    Example: stillroom compare runs/demo --output runs/demo/report.html
    """
    from stages.compare import compare

    print(f"report: {compare(runs, output)}")


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
        typer.Option(
            parser=as_path, help="Where it goes; RUN/exports/FORMAT or CACHE.FORMAT where left out."
        ),
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
    from pipeline.exchange import PLAIN_FORMATS
    from stages.export import export, print_export, publish
    from stages.export_cache import export_cache, is_cache

    console = Console()
    if is_cache(source) or format in PLAIN_FORMATS:
        given = {"--dtype": dtype, "--split": split, "--licence": licence, "--push": push}
        _refuse_options(
            f"{source} is exported as a cache", {name for name, value in given.items() if value}
        )
        export_cache(source, format or "parquet", output, hidden, console)
        return
    _refuse_options(f"{source} is no cache", {"--hidden"} if hidden else set())
    run, folder = as_folder(source), None if output is None else as_folder(output)
    done = export(run, format or "transformers", folder, dtype, split, licence, push)
    print_export(done, console)
    if push is not None:
        publish(done.folder, push, private, dry_run, console)


def _refuse_options(why: str, given: set[str]) -> None:
    if given:
        raise ConfigError(f"{why}; leave out {', '.join(sorted(given))}")
