"""The commands about finished caches, as `stages.cli` registers them: look, check, take, join."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.storage import as_path

Cache = Annotated[
    Path,
    typer.Argument(parser=as_path, help="The folder or URL of a finished cache, or of a view."),
]
Output = Annotated[Path, typer.Argument(parser=as_path, help="Where the view goes.")]


def inspect_command(
    cache: Annotated[
        Path, typer.Argument(parser=as_path, help="The folder or URL of a finished cache.")
    ],
    example: Annotated[
        str | None, typer.Option(help="An example id: show its text token by token.")
    ] = None,
) -> None:
    """Show what a cache holds, what it costs and how much of the teacher it keeps.

    Example: stillroom inspect data/caches/demo --example abc.py@0
    """
    from stages.inspect import inspect

    inspect(cache, example)


def verify_command(
    cache: Annotated[
        Path, typer.Argument(parser=as_path, help="The folder or URL of a cache, finished or not.")
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Queue damaged shards again, mend what can be.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Examples to look at, in place of all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    bytes_only: Annotated[
        bool, typer.Option("--bytes-only", help="Sizes and checksums; decode nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Shards at a time.")] = 4,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Ask this model again about the sample, or 32."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report for machines.")] = False,
) -> None:
    """Check every byte of a cache and what it means.

    The exit code is 0 where it is whole, 3 where it is sound but not finished, 4 where it is
    damaged, 5 where the teacher says something else, 1 where it cannot be told.

    Example: stillroom verify data/caches/demo --repair
    """
    from pipeline.cache.verifying.whole import Depth
    from stages.verify import verify

    depth = Depth(not bytes_only, sample, seed, jobs)
    raise typer.Exit(verify(cache, depth, repair, teacher, as_json))


def select_command(
    cache: Cache,
    output: Output,
    ids: Annotated[
        Path | None, typer.Option(parser=as_path, help="A file of example ids, one per line.")
    ] = None,
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


def extend_command(
    cache: Cache,
    config: Annotated[
        str, typer.Argument(help="The cache's config with more data: a YAML file, or a name.")
    ],
    output: Annotated[
        Path, typer.Option(parser=as_path, help="Where the view goes, and what is added.")
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Let changed examples take the place of cached ones.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
    ] = None,
) -> None:
    """Run the teacher over the examples that a cache does not hold, and view both as one.

    Example: stillroom extend data/caches/demo demo --set data.max_examples=9000 --output larger
    """
    from pipeline.config import load_config
    from stages.cache_teacher import CacheConfig
    from stages.extend import extend
    from stages.shipped import find_config

    extend(
        cache, load_config(CacheConfig, find_config("cache", config), set_ or []), output, replace
    )


def add_signal_command(
    cache: Cache,
    output: Output,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="hidden.layers=[4], targets.temperatures=[1,4], ...; repeatable.",
        ),
    ],
) -> None:
    """Ask the teacher of a cache for another layer or temperature of its own examples.

    Example: stillroom add-signal data/caches/demo data/caches/deeper --set hidden.layers=[2]
    """
    from stages.add_signal import add_signal

    add_signal(cache, output, set_)
