"""Export a cache: a cache -> one plain file that anybody reads without Stillroom."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, StillroomError, did_you_mean
from pipeline.examples import CachedExample
from pipeline.exchange import PLAIN_FORMATS
from pipeline.report.rows import format_bytes
from stages.progress import RowProgress

_MARKS = ("manifest.json", "draft.json", "view.json")


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache, finished or not, and no run."""
    return any((folder / name).is_file() for name in _MARKS)


def export_cache(
    path: Path,
    format: str = "parquet",
    output: Path | None = None,
    hidden: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a cache as plain columns; data/README.md describes them.

    Args:
        path: the cache's folder.
        format: a name of PLAIN_FORMATS.
        output: the file; <cache>.<format> beside the cache where left out.
        hidden: the hidden states too.

    Raises:
        StillroomError: no finished cache, no such format, a file that stands already, or a disk
            that refuses.
    """
    console = console or Console(quiet=True)
    if format not in PLAIN_FORMATS:
        raise ConfigError(
            f"--format {format!r} is none for a cache{did_you_mean(format, PLAIN_FORMATS)}"
        )
    cache = TeacherCache.open(path)
    beside = path.resolve() if path.name in ("", "..") else path  # . has no name
    file = output or beside.with_name(f"{beside.name}.{format}")
    if file.exists():
        raise StillroomError(f"{file}: stands already; choose another --output or delete it")
    if hidden and not cache.manifest.signals:
        raise ConfigError(f"--hidden: {path} keeps no hidden states; leave it out")
    with RowProgress(console, "exporting", len(cache)) as bar:

        def read() -> Iterator[CachedExample]:
            for row in range(len(cache)):
                yield cache[row]
                bar.advance(row + 1)

        PLAIN_FORMATS[format](file, cache.manifest, read(), hidden)
    size = format_bytes(file.stat().st_size)
    console.print(f"{file}: {len(cache):,} examples, {size}", soft_wrap=True)
    return file
