"""Whole files and folders: here they appear by rename, in a store by a put, which is atomic."""

import errno
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import StoreError
from pipeline.storage.listing import list_files, remove_tree
from pipeline.storage.places import is_local
from pipeline.storage.staging import scratch_folder, staging
from pipeline.storage.syncing import sync_file, sync_folder

_DRAFT = ".draft"
SMALL_BYTES = 64 * 2**20  # bytes of a file that is read at once, whoever wrote it
_UPLOADS = 4  # files sent at once
_PIECE = 16 * 2**20  # bytes that are asked for at once where nobody keeps them
_LATER = 1.0  # seconds in which a rival's put arrives, where a store has none that is conditional


def write_bytes(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Write a file so that it is there whole or not at all.

    Args:
        beside: what has to stand on this machine when the file comes there: it makes its folder
            anew where that has vanished, with all that the file would speak of.

    Raises:
        FileNotFoundError: that is gone.
    """
    if not is_local(path):
        remote: Any = path
        remote.fs.pipe_file(remote.path, content)
        return
    with writing(path) as draft:
        draft.write_bytes(content)
        if beside is not None:
            beside.stat()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file of this machine to be written; it becomes `path` when the block ends without an error.

    Whoever reads `path` meanwhile reads what it was before.
    """
    if not is_local(path):
        with staging() as folder:
            draft = folder / path.name
            yield draft
            _upload(draft, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with rewriting(path) as draft:
        yield draft


@contextmanager
def rewriting(path: Path) -> Iterator[Path]:
    """As `writing`, on this machine, in a folder that is not made anew if it has vanished."""
    draft = path.with_name(path.name + _DRAFT)
    yield draft
    sync_file(draft)
    draft.replace(path)
    sync_folder(path.parent)


@contextmanager
def writing_folder(
    path: Path,
    last: str | None = None,
    drafts: Path | None = None,
    stands: Callable[[], bool] = lambda: False,
) -> Iterator[Path]:
    """An empty folder of this machine to be filled; it takes the place of what was at `path`.

    On this machine it is `path` itself, emptied at once, or one of its own in `drafts`, renamed
    when the block has ended without an error. Elsewhere nothing is touched until then; then the old
    `last` is removed, all other files are sent and looked for in the store's own list with their
    sizes, and `last` is sent: where it stands, they do.

    Args:
        drafts: a folder of the same disk; what others left there of this path is removed.
        stands: asked when the draft is whole and something lies at `path`: whether that is what was
            to be made, so that the draft is not needed.

    Raises:
        OSError: the disk refuses.
        StoreError: the store does not answer, or lacks what it was sent.
    """
    if is_local(path) and drafts is not None:
        with _drafting(path, drafts, stands) as draft:
            yield draft
        return
    if is_local(path):
        remove_tree(path)
        path.mkdir(parents=True)
        yield path
        return
    with staging() as local:
        yield local
        send_folder(local, path, last)


@contextmanager
def _drafting(path: Path, drafts: Path, stands: Callable[[], bool]) -> Iterator[Path]:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent.parent)
    for left in drafts.glob(f"{path.name}.*"):
        remove_tree(left)
    draft = drafts / f"{path.name}.{secrets.token_hex(8)}"
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            draft.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if stands():
                return
            old = draft.with_name(f"{draft.name}.old")
            path.rename(old)
            draft.rename(path)
            remove_tree(old)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # what broke off has an error of its own
            remove_tree(draft)


def send_folder(local: Path, path: Path, last: str | None = None) -> None:
    """Send the files of a folder to a store; see `writing_folder`."""
    remote: Any = path
    sizes = list_files(local)
    if last is not None:
        remote.fs.rm_file((remote / last).path)
    names = sorted(name for name in sizes if name != last)
    with ThreadPoolExecutor(_UPLOADS) as pool:
        list(pool.map(lambda name: _upload(local / name, path / name), names))
    found = list_files(path)
    for name in names:
        if found.get(name) != sizes[name]:
            raise StoreError(
                f"{path / name}: has {found.get(name)} bytes in the store's list after"
                f" {sizes[name]} were sent; what is finished is safe, run the same command again"
            )
    if stale := sorted(found.keys() - sizes.keys()):
        remote.fs.rm([(remote / name).path for name in stale])
    if last is not None:
        _upload(local / last, path / last)


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """The file, or a copy of it on this machine until the block ends."""
    if is_local(path):
        yield path
        return
    with staging() as folder:
        copy = folder / path.name
        remote: Any = path
        remote.fs.get_file(remote.path, str(copy))
        yield copy


def create_object(path: Path, content: bytes) -> bool:
    """Put an object if there is none; of several that do so at once, one succeeds.

    Stores do this by a conditional put: S3, Google, Azure, MinIO, Cloudflare and others. One that
    has none is asked whether the object is there, given it, and a second later asked whose it is:
    the last one to come has it, unless one was more than a second on its way.

    Args:
        path: in a store.
        content: different for each process, by which it knows its own again.
    """
    remote: Any = path
    try:
        remote.fs.pipe_file(remote.path, content, mode="create")
    except FileExistsError:
        return path.read_bytes() == content  # put by us, whose answer was lost
    except NotImplementedError:
        if path.exists():
            return False
        write_bytes(path, content)
        time.sleep(_LATER)
        return path.read_bytes() == content
    return True


def read_small(path: Path) -> bytes:
    """A file that shows by itself whether it is whole; of a store by one request.

    Raises:
        OSError: it is missing, cannot be read, or has more than 64 MB.
    """
    if is_local(path):
        size = path.stat().st_size
        if size > SMALL_BYTES:
            raise OSError(f"{size:,} bytes, at most {SMALL_BYTES:,} make sense")
        return path.read_bytes()
    remote: Any = path
    content: bytes = remote.fs.cat_first(remote.path, SMALL_BYTES + 1)
    if len(content) > SMALL_BYTES:
        raise OSError(f"more than {SMALL_BYTES:,} bytes make no sense")
    return content


def hash_file(path: Path, size: int | None = None) -> str:
    """sha256 of a file's content, in hex.

    Args:
        size: its bytes, where they are known: a store need not be asked for them.

    Raises:
        OSError: it is missing, shorter, or cannot be read.
    """
    if is_local(path):
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    remote: Any = path
    size = int(remote.fs.info(remote.path)["size"]) if size is None else size
    digest = hashlib.sha256()
    for piece in _read_pieces(path, size):
        digest.update(piece)
    return digest.hexdigest()


def fetch_file(path: Path, copy: Path, size: int) -> str:
    """Copy a file of a store to this machine, so many bytes of it, and return their sha256 in hex.

    Raises:
        OSError: it is missing or shorter, or there is no room here.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with copy.open("wb") as opened:
        for piece in _read_pieces(path, size):
            digest.update(piece)
            opened.write(piece)
    return digest.hexdigest()


def local_folder(path: Path) -> Path:
    """The folder, or a copy of it on this machine, made anew each time."""
    if is_local(path):
        return path
    copy = scratch_folder(path)
    remove_tree(copy)
    for name in list_files(path):
        write_bytes(copy / name, (path / name).read_bytes())
    return copy


def map_file(path: Path) -> Any:
    """A whole file as a buffer: mapped into memory here, in memory elsewhere."""
    local = is_local(path)
    return pa.memory_map(str(path)).read_buffer() if local else pa.py_buffer(path.read_bytes())


def _read_pieces(path: Path, size: int) -> Iterator[bytes]:
    remote: Any = path
    for start in range(0, size, _PIECE):
        yield remote.fs.cat_file(remote.path, start=start, end=min(start + _PIECE, size))


def _upload(local: Path, path: Path) -> None:
    remote: Any = path
    remote.fs.put_file(str(local), remote.path)
