"""The commands that make views of finished caches, as `stages.cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.storage import as_path

Cache = Annotated[
    Path,
    typer.Argument(parser=as_path, help="The folder or URL of a finished cache, or of a view."),
]
Output = Annotated[Path, typer.Argument(parser=as_path, help="Where the view goes.")]


def select_command(
    cache: Cache,
    output: Output,
    ids: Annotated[Path | None, typer.Option(help="A file of example ids, one per line.")] = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=A,B", help="A carried column has one of these; repeatable."),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Of those left, each so many-th.")] = 1,
    first: Annotated[
        int | None, typer.Option(min=1, help="Of those left, the first so many.")
    ] = None,
) -> None:
    """Take some examples of a cache as a view: a cache to every other command, copied from nowhere.

    Example: stillroom select data/caches/demo data/caches/small --split train --first 1000
    """
    from stages.select import Choice, parse_where, select

    select(cache, output, Choice(ids, split, parse_where(where or []), every, first))


def filter_command(
    cache: Cache,
    output: Output,
    kept_mass: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Mean mass of the kept classes.")
    ] = None,
    entropy: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="The teacher's mean entropy, in nats.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="The teacher's mean loss, in nats.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Length in tokens.")
    ] = None,
) -> None:
    """Take the examples about which the teacher said what is asked for, as a view.

    Example: stillroom filter data/caches/demo data/caches/sure --entropy :2 --tokens 16:
    """
    from stages.select import Bounds, filter_cache, parse_range

    bounds = Bounds(
        parse_range("--kept-mass", kept_mass),
        parse_range("--entropy", entropy),
        parse_range("--loss", loss),
        parse_range("--tokens", tokens),
    )
    filter_cache(cache, output, bounds)


def merge_command(
    caches: Annotated[
        list[Path],
        typer.Argument(
            parser=as_path, help="Two or more caches or views, and where the view goes."
        ),
    ],
) -> None:
    """Join caches of one teacher, tokenizer, task and settings as a view of all their examples.

    Example: stillroom merge data/caches/english data/caches/swahili data/caches/both
    """
    from stages.merge import merge

    *given, output = caches
    merge(given, output)
