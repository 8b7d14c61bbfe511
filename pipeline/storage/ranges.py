"""Parts of a file: mapped into memory here; of a store asked for by ranges, kept near, and ahead.

read_ahead --threads--> on their way -> kept on this machine -> read -> memory
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa

from pipeline.errors import CacheError
from pipeline.storage.files import read_small
from pipeline.storage.kept import kept_ranges
from pipeline.storage.places import is_local

_THREADS = 8
_TOGETHER = 4 * 2**20  # bytes that are asked for at once where they are neighbours
_AHEAD_BYTES = 128 * 2**20  # on their way, or arrived and not asked for yet


class RangeReader:
    """A file of which parts are read.

    Attributes:
        path: the file.
        version: a digest of its content; with it what was read from a store is kept on this machine
            (see `kept`), without it is asked for each time.
    """

    def __init__(self, path: Path, version: str | None = None) -> None:
        self.path = path
        self.version = version
        self._name = f"{path} {version}"
        self._whole: Any = None
        if is_local(path):
            self._whole = pa.memory_map(str(path)).read_buffer()

    def read(self, start: int, size: int) -> Any:
        """A buffer of exactly these bytes.

        Raises:
            OSError: the file ends before, or cannot be read.
            StoreError: the store does not answer.
        """
        if self._whole is None:
            return self._find(start, size, compare=True)
        there = max(0, min(size, self._whole.size - start))
        return self._require(self._whole.slice(start, there) if there else b"", start, size)

    def read_checked(
        self, start: int, size: int, is_whole: Callable[[Any], bool]
    ) -> tuple[Any, bool]:
        """The same, and whether it is what it should be.

        Args:
            is_whole: tells that of some bytes; others are asked of a store once more, past what is
                kept, which has no need of a checksum of its own.
        """
        if self._whole is not None:
            content = self.read(start, size)
            return content, is_whole(content)
        content = self._find(start, size, compare=False)
        if is_whole(content):
            return content, True
        content = self._fetch(start, size)
        return content, is_whole(content)

    def read_ahead(self, parts: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch parts, (start, size), that will be read soon; neighbours together, nothing
        that is near already."""
        if self._whole is not None or self.version is None:
            return
        for run in _join([part for part in sorted(set(parts)) if not self._is_near(*part)]):
            sizes = {self._key(*part): part[1] for part in run}
            _ON_THEIR_WAY.begin(sizes, partial(self._fetch_run, run))

    def _is_near(self, start: int, size: int) -> bool:
        key = self._key(start, size)
        return _ON_THEIR_WAY.holds(key) or kept_ranges().holds(key)

    def _fetch_run(self, run: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The parts of one range by their keys."""
        near = {key: kept_ranges().get(key) for key in (self._key(*part) for part in run)}
        if None not in near.values():
            return near  # somebody needed them, and was quicker than whoever looked ahead
        first = run[0][0]
        whole = self._ask(first, sum(size for _, size in run))
        pieces = {self._key(a, n): bytes(whole[a - first : a - first + n]) for a, n in run}
        for key, piece in pieces.items():
            kept_ranges().put(key, piece)
        return {key: pa.py_buffer(piece) for key, piece in pieces.items()}

    def _find(self, start: int, size: int, compare: bool) -> Any:
        if self.version is None:
            return self._fetch(start, size)
        key = self._key(start, size)
        look = partial(kept_ranges().get, key, compare, size)
        near = None if _ON_THEIR_WAY.holds(key) else look()
        # Looked for again: it may have come, and been taken by another thread, in between.
        return near or _ON_THEIR_WAY.take(key, size, lambda: look() or self._fetch(start, size))

    def _fetch(self, start: int, size: int) -> Any:
        content = self._ask(start, size)
        if self.version is not None:
            kept_ranges().put(self._key(start, size), content)
        return pa.py_buffer(content)

    def _ask(self, start: int, size: int) -> bytes:
        remote: Any = self.path
        content: bytes = remote.fs.cat_file(remote.path, start=start, end=start + size)
        self._require(content, start, size)
        return content

    def _key(self, start: int, size: int) -> str:
        return f"{self._name} {start} {size}"

    def _require(self, found: Any, start: int, size: int) -> Any:
        if len(found) != size:
            raise OSError(f"{self.path.name} ends after {start + len(found):,} bytes")
        return pa.py_buffer(found)


def read_into(
    path: Path,
    start: int,
    content: memoryview,
    version: str,
    is_whole: Callable[[Any], bool],
) -> bool:
    """Fill memory with the bytes of a file from `start` on, and tell whether they are what they
    should be; see `RangeReader`.

    Raises:
        OSError: the file ends before, or cannot be read.
    """
    if is_local(path):
        with path.open("rb", buffering=0) as opened:
            opened.seek(start)
            size = opened.readinto(content)
        if size != len(content):
            raise OSError(f"{path.name} ends after {start + size:,} bytes")
        return is_whole(content)
    found, whole = RangeReader(path, version).read_checked(start, len(content), is_whole)
    content[:] = memoryview(found).cast("B")
    return whole


def read_known(path: Path, sha256: str) -> bytes:
    """A small file whose digest is known; of a store it is kept near.

    What comes from a store and has another digest is asked for once more; whether it then has the
    right one is the caller's to compare.

    Raises:
        CacheError: it is missing or cannot be read.
    """
    key = f"{path} {sha256}"
    try:
        if is_local(path):
            return read_small(path)
        content: bytes = _ON_THEIR_WAY.take(key, 0, lambda: _find_known(path, sha256, key))
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be read ({error}); copy the cache again, or mend it with `stillroom"
            " verify --repair`"
        ) from error
    return content


def read_known_ahead(path: Path, sha256: str) -> None:
    """Begin to fetch a small file that will be read soon, if it is not near already."""
    key = f"{path} {sha256}"
    if not is_local(path) and not kept_ranges().holds(key):
        _ON_THEIR_WAY.begin({key: 0}, lambda: {key: _find_known(path, sha256, key)})


def _find_known(path: Path, sha256: str, key: str) -> bytes:
    kept = kept_ranges().get(key, compare=False)
    if kept is not None and hashlib.sha256(kept).hexdigest() == sha256:
        return bytes(kept)
    content = read_small(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        content = read_small(path)
    kept_ranges().put(key, content)
    return content


def open_file(path: Path) -> Any:
    """A file for Arrow's readers: mapped into memory here, read by ranges elsewhere."""
    if is_local(path):
        return pa.memory_map(str(path))
    return pa.PythonFile(path.open("rb"), mode="r")


class _OnTheirWay:
    """Ranges that this process fetches, each once however many ask, until somebody takes them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: OrderedDict[str, tuple[Future[Any], int]] = OrderedDict()
        self._bytes = 0

    def begin(self, sizes: Mapping[str, int], fetch: Callable[[], Mapping[str, Any]]) -> None:
        """Fetch on another thread what of these keys is not on its way."""
        futures = {key: self._enter(key, size) for key, size in sizes.items()}
        mine = {key: future for key, future in futures.items() if future is not None}
        if not mine:
            return
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, "stillroom-ahead")
        self._pool.submit(_settle_all, mine, fetch)

    def holds(self, key: str) -> bool:
        """Whether something is on its way, or has arrived and was not taken yet."""
        with self._lock:
            return key in self._coming

    def take(self, key: str, size: int, fetch: Callable[[], Any]) -> Any:
        """What is on its way, or is fetched now."""
        future = self._enter(key, size)
        if future is not None:
            _settle(future, fetch)
        else:
            with self._lock:
                future = self._coming[key][0] if key in self._coming else None
        try:
            return fetch() if future is None else future.result()
        finally:
            with self._lock:
                if key in self._coming and self._coming[key][0] is future:
                    self._bytes -= self._coming.pop(key)[1]

    def _enter(self, key: str, size: int) -> "Future[Any] | None":
        """To be settled by whoever asked; None where somebody else was first."""
        with self._lock:
            if key in self._coming:
                return None
            future: Future[Any] = Future()
            self._coming[key] = future, size
            self._bytes += size
            while self._bytes > _AHEAD_BYTES and len(self._coming) > 1:
                self._bytes -= self._coming.popitem(last=False)[1][1]  # it is kept on the disk
            return future


def _settle(future: "Future[Any]", fetch: Callable[[], Any]) -> None:
    try:
        future.set_result(fetch())
    except BaseException as error:
        future.set_exception(error)


def _settle_all(futures: "Mapping[str, Future[Any]]", fetch: Callable[[], Any]) -> None:
    try:
        found = fetch()
    except BaseException as error:
        for future in futures.values():
            future.set_exception(error)
    else:
        for key, future in futures.items():
            future.set_result(found[key])


def _join(parts: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of parts that touch, of at most so many bytes."""
    run: list[tuple[int, int]] = []
    for start, size in parts:
        touches = bool(run) and run[-1][0] + run[-1][1] == start
        if run and (not touches or start + size - run[0][0] > _TOGETHER):
            yield run
            run = []
        run.append((start, size))
    if run:
        yield run


_ON_THEIR_WAY = _OnTheirWay()


def _forget() -> None:
    """In the child of a fork there are no threads, and locks may be held for ever."""
    global _ON_THEIR_WAY  # noqa: PLW0603  # of this process
    _ON_THEIR_WAY = _OnTheirWay()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
