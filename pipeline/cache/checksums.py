"""Sizes and sha256 of files: taken when they are written, compared before they are believed."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.cache.manifest import Files
from pipeline.errors import CacheError
from pipeline.storage import find_size, hash_file, list_files


def sum_files(folder: Path, *parts: str) -> Files:
    """path -> [bytes, sha256] of all files below a folder, or of those of some parts of it."""
    sizes: dict[str, int] = {} if parts else list_files(folder)
    for part in parts:
        sizes |= _list_part(folder, part)
    names = sorted(sizes, key=lambda name: name.split("/"))
    return {name: (sizes[name], hash_file(folder / name, sizes[name])) for name in names}


def _list_part(folder: Path, part: str) -> dict[str, int]:
    size = find_size(folder / part)
    if size is not None:
        return {part: size}
    return {f"{part}/{name}": size for name, size in list_files(folder / part).items()}


def find_difference(
    folder: Path, name: str, files: Files, sizes: Mapping[str, int] | None = None
) -> str | None:
    """What is wrong with a file that is listed, None where nothing is.

    Args:
        sizes: bytes of all files of the folder, where they are known.
    """
    size, digest = files[name]
    found = find_size(folder / name) if sizes is None else sizes.get(name)
    if found is None:
        return "is missing"
    if found != size:
        return f"has {found:,} bytes, expected {size:,}"
    if hash_file(folder / name, size) != digest:
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
