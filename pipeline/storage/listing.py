"""Which files there are below a place, how large they are, and that they go."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import CacheError
from pipeline.storage.places import is_local


def list_files(path: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path below it; of a store, by one listing.

    Raises:
        CacheError: a store lists a name that would lead out of a folder of this machine.
    """
    if is_local(path):
        files = (file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    remote: Any = path
    try:
        found = remote.fs.find(remote.path, detail=True)
    except FileNotFoundError:  # nor is what should hold it: a bucket, a repository
        return {}
    root = remote.path.rstrip("/") + "/"
    names = {name: name.removeprefix(root) for name in found}
    for name in names.values():  # a key of a store may hold anything
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
            raise CacheError(f"{path}: lists {name[:80]!r}, which leads out of it; copy it by hand")
    return {names[name]: entry["size"] for name, entry in found.items()}


def find_size(path: Path) -> int | None:
    """Bytes of a file, None where there is none; of a store by one request."""
    if is_local(path):
        return path.stat().st_size if path.is_file() else None
    remote: Any = path
    try:
        found = remote.fs.info(remote.path)
    except FileNotFoundError:
        return None
    return int(found["size"]) if found["type"] == "file" else None


def remove_file(path: Path) -> None:
    """Remove a file, if it is there; of a store by one request.

    Raises:
        OSError: it cannot be removed.
        StoreError: likewise, of a store.
    """
    if is_local(path):
        path.unlink(missing_ok=True)
    else:
        remote: Any = path
        remote.fs.rm_file(remote.path)


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it, if it is there.

    Raises:
        OSError: some of it cannot be removed.
    """
    if is_local(path):
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    elif names := list_files(path):
        remote: Any = path
        remote.fs.rm([(remote / name).path for name in names])


def remove_folder(path: Path) -> None:
    """Remove an empty folder; a store has none.

    Raises:
        OSError: it is not empty, or not there.
    """
    if is_local(path):
        path.rmdir()
