"""Sizes and sha256 of files: taken when they are written, compared before they are believed."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.cache.manifest import Files
from pipeline.errors import CacheError
from pipeline.storage import hash_file


def sum_files(folder: Path, *parts: str) -> Files:
    """path -> [bytes, sha256] of all files below a folder, or of those of some parts of it."""
    roots = [folder / part for part in parts] or [folder]
    found = sorted((file for root in roots for file in walk(root)), key=lambda file: file.parts)
    return {
        file.relative_to(folder).as_posix(): (file.stat().st_size, hash_file(file))
        for file in found
    }


def walk(path: Path) -> Iterator[Path]:
    """A file itself, or all files below a folder; none where there is neither."""
    if path.is_dir():
        for child in path.iterdir():
            yield from walk(child)
    elif path.is_file():
        yield path


def find_difference(folder: Path, name: str, files: Files) -> str | None:
    """What is wrong with a file that is listed, None where nothing is."""
    size, digest = files[name]
    file = folder / name
    if not file.is_file():
        return f"{file}: is missing"
    if (found := file.stat().st_size) != size:
        return f"{file}: has {found:,} bytes, expected {size:,}"
    if hash_file(file) != digest:
        return f"{file}: fails its checksum"
    return None


def require_listed(folder: Path, files: Files, prefix: str) -> None:
    """Compare what is listed below a prefix with the list, before it is read.

    Raises:
        CacheError: a file is missing or damaged.
    """
    for name in files:
        if name.startswith(prefix) and (damage := find_difference(folder, name, files)):
            raise CacheError(f"{damage}; mend it with `stillroom verify --repair`")
