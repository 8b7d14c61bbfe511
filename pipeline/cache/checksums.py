"""Sizes and sha256 of files: taken when they are written, compared before they are believed."""

from pathlib import Path

from pipeline.cache.manifest import Files
from pipeline.errors import CacheError
from pipeline.storage import hash_file, list_files


def sum_files(folder: Path, *parts: str) -> Files:
    """path -> [bytes, sha256] of all files below a folder, or of those of some parts of it."""
    names = [name for part in parts for name in _list_part(folder, part)]
    names = sorted(names if parts else list_files(folder), key=lambda name: name.split("/"))
    return {name: ((folder / name).stat().st_size, hash_file(folder / name)) for name in names}


def _list_part(folder: Path, part: str) -> list[str]:
    if (folder / part).is_file():
        return [part]
    return [f"{part}/{name}" for name in list_files(folder / part)]


def find_difference(folder: Path, name: str, files: Files) -> str | None:
    """What is wrong with a file that is listed, None where nothing is."""
    size, digest = files[name]
    file = folder / name
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != size:
        return f"has {found:,} bytes, expected {size:,}"
    if hash_file(file) != digest:
        return "fails its checksum"
    return None


def require_listed(folder: Path, files: Files, prefix: str) -> None:
    """Compare what is listed below a prefix with the list, before it is read.

    Raises:
        CacheError: a file is missing or damaged.
    """
    for name in files:
        if name.startswith(prefix) and (damage := find_difference(folder, name, files)):
            raise CacheError(f"{folder / name}: {damage}; mend it with `stillroom verify --repair`")
