"""Where a cache lies: a folder of this machine, or a prefix of an object store.

    text -- as_path --> Path, or UPath for s3://, gs://, az://, hf://, memory://

Either is joined by `/` and read by `read_bytes`; this module has what differs: writing whole or not
at all, ranges of a file, files that must lie on this machine, lists. A local file appears by rename
after its bytes are on the disk; an object appears by its put, which is atomic.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import PlainSerializer, PlainValidator
from upath import UPath

from pipeline.errors import ConfigError

CACHE_VARIABLE = "STILLROOM_CACHE_DIR"
_DRAFT = ".draft"


def as_path(text: str | Path) -> Path:
    """A path of this machine, or of the object store that a URL names.

    Raises:
        ConfigError: no such kind of store, or its package is not installed.
    """
    if not isinstance(text, str) or "://" not in text:
        return text if isinstance(text, UPath) else Path(text)
    try:
        # Listings kept by fsspec would hide what other processes write.
        remote: Any = UPath(text.rstrip("/"), use_listings_cache=False)
        remote.fs  # noqa: B018  # where the package is missing it fails here, not in the middle
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{text}: this kind of address cannot be opened ({error}); for s3:// install"
            " stillroom[s3], for gs:// gcsfs, for az:// adlfs"
        ) from error
    path: Path = remote
    return path


Location = Annotated[Path, PlainValidator(as_path), PlainSerializer(str, when_used="json")]


def is_local(path: Path) -> bool:
    """Whether it lies on a file system of this machine."""
    return isinstance(path, Path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with writing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file of this machine to be written; it becomes `path` when the block ends without an error.

    Whoever reads `path` meanwhile reads what it was before.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="stillroom-") as folder:
            draft = Path(folder) / path.name
            yield draft
            _upload(draft, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + _DRAFT)
    yield draft
    sync_file(draft)
    draft.replace(path)


@contextmanager
def writing_folder(path: Path, last: str | None = None) -> Iterator[Path]:
    """An empty folder of this machine to be filled; what was at `path` before is removed.

    On this machine it is `path` itself. Elsewhere its files are sent when the block ends without an
    error, `last` after all others, so that where it stands they do.
    """
    remove_tree(path)
    if is_local(path):
        path.mkdir(parents=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder:
        local = Path(folder)
        yield local
        names = sorted(list_files(local), key=lambda name: (name == last, name))
        for name in names:
            _upload(local / name, path / name)


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """The file, or a copy of it on this machine until the block ends."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder:
        copy = Path(folder) / path.name
        remote: Any = path
        remote.fs.get_file(remote.path, str(copy))
        yield copy


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it, if it is there."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif names := list_files(path):
        remote: Any = path
        remote.fs.rm([(remote / name).path for name in names])


def list_files(path: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path below it; of a store, by one listing."""
    if is_local(path):
        files = (file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    remote: Any = path
    found = remote.fs.find(remote.path, detail=True)
    root = remote.path.rstrip("/") + "/"
    return {name.removeprefix(root): entry["size"] for name, entry in found.items()}


class RangeReader:
    """A file of which parts are read: mapped into memory here, asked for by ranges elsewhere."""

    def __init__(self, path: Path) -> None:
        self._path: Any = path
        self._whole: Any = None
        if is_local(path):
            self._whole = pa.memory_map(str(path)).read_buffer()

    def read(self, start: int, size: int) -> Any:
        """A buffer of exactly these bytes.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        if self._whole is not None:
            found = self._whole.slice(start, size) if start <= self._whole.size else b""
        else:
            found = self._path.fs.cat_file(self._path.path, start=start, end=start + size)
        if len(found) != size:
            raise OSError(f"{self._path.name} ends after {start + len(found):,} bytes")
        return pa.py_buffer(found)


def read_into(path: Path, start: int, content: memoryview) -> None:
    """Fill memory with the bytes of a file from `start` on.

    Raises:
        OSError: the file ends before, or cannot be read.
    """
    if is_local(path):
        with path.open("rb", buffering=0) as opened:
            opened.seek(start)
            size = opened.readinto(content)
    else:
        content[:] = RangeReader(path).read(start, len(content))
        size = len(content)
    if size != len(content):
        raise OSError(f"{path.name} ends after {start + size:,} bytes")


def open_file(path: Path) -> Any:
    """A file for Arrow's readers: mapped into memory here, read by ranges elsewhere."""
    if is_local(path):
        return pa.memory_map(str(path))
    return pa.PythonFile(path.open("rb"), mode="r")


def map_file(path: Path) -> Any:
    """A whole file as a buffer: mapped into memory here, in memory elsewhere."""
    local = is_local(path)
    return pa.memory_map(str(path)).read_buffer() if local else pa.py_buffer(path.read_bytes())


def local_folder(path: Path) -> Path:
    """The folder, or a copy of it on this machine, made anew each time."""
    if is_local(path):
        return path
    copy = scratch_folder(path)
    remove_tree(copy)
    for name in list_files(path):
        write_bytes(copy / name, (path / name).read_bytes())
    return copy


def scratch_folder(path: Path) -> Path:
    """Where files that wait for a folder lie: in it, or at one place of this machine for each."""
    if is_local(path):
        return path
    home = os.environ.get(CACHE_VARIABLE)
    root = Path(home) if home else Path.home() / ".cache" / "stillroom"
    return root / hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk; a store has no such thing."""
    if is_local(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Bring a folder and all below it to the disk."""
    if is_local(path):
        for below in path.rglob("*"):
            (sync_folder if below.is_dir() else sync_file)(below)
        sync_folder(path)


def _upload(local: Path, path: Path) -> None:
    remote: Any = path
    remote.fs.put_file(str(local), remote.path)
