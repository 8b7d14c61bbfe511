"""A store's file system that asks again where the network or the store fails for a moment.

    UPath -> PatientFiles -> s3fs, gcsfs, adlfs, huggingface_hub, memory -> the network

What the store has decided (no such object, no right to it, a request that makes no sense) is raised
at once; anything else is tried again, each time after a longer pause, and at last told in one line.
It holds no connection itself, so that it may pass a fork: whoever asks, asks with a file system of
its own process.
"""

import errno
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pipeline.errors import StoreError
from pipeline.storage.refusals import (
    BEYOND,
    find_status,
    is_final,
    is_missing,
    name_refusal,
    say_once,
)

PATIENCE_VARIABLE = "STILLROOM_STORE_PATIENCE"
TIMEOUT_VARIABLE = "STILLROOM_STORE_TIMEOUT"
_PATIENCE = 120.0  # seconds of pauses before giving up
_TIMEOUT = 20.0  # seconds without an answer
_TRIES = 8  # the first pause is a 128th of the patience, each is twice the one before
_LEAST = 3  # tries that are made even where answers take longer than the patience
_SLOWEST = 64 * 2**10  # bytes per second; a transfer that is slower is begun again
_PART = 16 * 2**20  # bytes of a part of an upload; up to twice as many are put at once
_MOST_PARTS = 10_000
_NO_HOLDER = "the bucket, container or repository does not exist"

_RANDOM = random.SystemRandom()  # the training's own generator must not notice

Answer = TypeVar("Answer")


class PatientFiles(AbstractFileSystem):  # type: ignore[misc]  # ships without types
    """Asks the file system of a protocol again where it fails.

    Raises, from every method:
        StoreError: it did not answer in time, or refused; one line that says what to do.
        FileNotFoundError, FileExistsError: as file systems do.
    """

    cachable = False

    def __init__(self, protocol: str, options: Mapping[str, Any]) -> None:
        """Ask nothing yet.

        Args:
            protocol: of the store, as fsspec names it.
            options: of its file system.

        Raises:
            ImportError: its package is not installed.
            ValueError: no such protocol.
        """
        super().__init__()
        self._store = protocol
        self._options = dict(options)
        self._files()

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._ask("looked up", path, "info", path)

    def exists(self, path: str, **kwargs: Any) -> bool:
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        if self._store != "s3":
            return self._kind(path) == "file"
        try:
            self.cat_first(path, 1)  # where it is missing, to look it up would be to list it too
        except FileNotFoundError:
            return False
        return True

    def isdir(self, path: str) -> bool:
        return self._kind(path) == "directory"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self._ask("listed", path, "ls", path, detail=detail)

    def find(self, path: str, **kwargs: Any) -> Any:
        return self._ask("listed", path, "find", path, **kwargs)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        first = start or 0
        last = int(self.info(path)["size"]) if end is None else end  # so that its end is missed
        size = last - first
        if size <= 0:
            return b""

        def read() -> bytes:
            try:
                found: bytes = self._call("cat_file", size, path, start=first, end=last, **kwargs)
            except Exception as error:
                if find_status(error)[0] != BEYOND:
                    raise
                found = b""
            if len(found) != size and self.info(path)["size"] >= last:
                raise OSError(f"{len(found):,} of {size:,} bytes arrived")
            return found

        return self._repeat("read", path, read)

    def cat_first(self, path: str, most: int) -> bytes:
        """The first bytes of an object, by one request: unlike in `cat_file`, nobody asks whether
        there are more of them than arrived."""

        def read() -> bytes:
            try:
                found: bytes = self._call("cat_file", _PART, path, start=0, end=most)
            except Exception as error:
                if find_status(error)[0] != BEYOND:
                    raise
                found = b""
            return found

        return self._repeat("read", path, read)

    def get_file(self, rpath: str, lpath: Any, **kwargs: Any) -> None:
        size = self.info(rpath)["size"]

        def get() -> None:
            self._call("get_file", size, rpath, str(lpath))
            if (found := Path(lpath).stat().st_size) != size:
                raise OSError(f"{found:,} of {size:,} bytes arrived")

        self._repeat("read", rpath, get)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put an object.

        Raises:
            FileExistsError: mode is "create", and it is there.
            NotImplementedError: mode is "create", and the store has no conditional put.
        """
        kind = type(self._files())
        generic = kind.pipe_file is AbstractFileSystem.pipe_file
        if mode == "create" and generic and not issubclass(kind, AsyncFileSystem):
            # It would look and then put, as two may do who look at once.
            raise NotImplementedError(f"{self._store}:// has no conditional put")

        def put() -> None:
            self._call("pipe_file", len(value), path, value, mode=mode)

        self._repeat("written", path, put, missing=_NO_HOLDER)

    def put_file(self, lpath: Any, rpath: str, **kwargs: Any) -> None:
        size = Path(lpath).stat().st_size
        if self._store == "s3":
            kwargs = {"chunksize": max(_PART, -(-size // _MOST_PARTS)), "max_concurrency": 4}

        def put() -> None:
            self._call("put_file", size, str(lpath), rpath, **kwargs)

        self._repeat("written", rpath, put, missing=_NO_HOLDER)

    def rm_file(self, path: str) -> None:
        def remove() -> None:
            try:
                self._call("rm_file", 0, path)
            except Exception as error:
                if not is_missing(error):  # by the try before, whose answer was lost
                    raise

        self._repeat("removed", path, remove)

    def rm(self, path: str | list[str], recursive: bool = False, **kwargs: Any) -> None:
        if self._store == "hf" and isinstance(path, list):  # it takes one at a time
            for one in path:
                self.rm_file(one)
            return

        def remove() -> None:
            try:
                self._call("rm", 0, path, recursive=recursive)
            except Exception as error:
                if not is_missing(error):
                    raise

        self._repeat("removed", path if isinstance(path, str) else path[0], remove)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing: an object's name needs no folder, and a bucket is its owner's to make."""

    makedirs = mkdir

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "_ReadFile":
        if mode != "rb":
            raise NotImplementedError(f"{path}: objects are written whole, by pipe_file")
        return _ReadFile(self, path, mode, cache_type="readahead", block_size=2**20)

    def _kind(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _ask(self, done: str, path: str, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._repeat(done, path, lambda: self._call(method, 0, *args, **kwargs))

    def _files(self) -> Any:
        """The file system of this process; fsspec keeps one for equal options."""
        options = dict(self._options)
        if self._store == "s3":
            timeout = read_seconds(TIMEOUT_VARIABLE, _TIMEOUT)
            config = {"connect_timeout": timeout, "read_timeout": timeout}
            options["config_kwargs"] = config | options.get("config_kwargs", {})
        files = fsspec.filesystem(self._store, **options)
        if self._store == "s3":
            files.retries = 1  # what is repeated here need not be repeated there
        return files

    def _call(self, method: str, size: int, *args: Any, **kwargs: Any) -> Any:
        files = self._files()
        if isinstance(files, AsyncFileSystem):
            limit = 2 * read_seconds(TIMEOUT_VARIABLE, _TIMEOUT) + size / _SLOWEST
            return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=limit, **kwargs)
        if self._store == "hf":
            if method == "cat_file":  # what was asked for, of a file that nobody looks up before
                kwargs |= {"size": kwargs["end"], "cache_type": "none"}
            else:
                files.dircache.clear()  # it would hide what others write, whatever it is told
        return getattr(files, method)(*args, **kwargs)

    def _repeat(
        self, done: str, path: str, call: Callable[[], Answer], missing: str | None = None
    ) -> Answer:
        """Call until it works.

        Args:
            done: what was to be done to the path, for the error.
            missing: what it means that something is not found, where that is an error.
        """
        patience = read_seconds(PATIENCE_VARIABLE, _PATIENCE)
        began = time.monotonic()
        url = f"{self._store}://{path}"
        for tries in range(1, _TRIES + 1):
            try:
                return call()
            except FileExistsError:
                raise
            except Exception as error:
                if is_missing(error) and is_final(error):
                    if missing is None:
                        raise FileNotFoundError(errno.ENOENT, "no such object", url) from error
                    told = f"{url}: cannot be {done} ({missing}); create it first"
                    raise StoreError(told) from error
                if is_final(error):
                    raise name_refusal(url, done, error) from error
                waited = time.monotonic() - began
                if tries == _TRIES or (tries >= _LEAST and waited >= patience):
                    raise StoreError(
                        f"{url}: cannot be {done} ({say_once(error)}), {tries} tries in"
                        f" {waited:,.1f} s; what is finished is safe, run the same command again"
                        f" when the store answers, or be more patient by {PATIENCE_VARIABLE}"
                    ) from error
            time.sleep(patience / 2**_TRIES * 2**tries * _RANDOM.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")


class _ReadFile(AbstractBufferedFile):  # type: ignore[misc]  # ships without types
    """An object opened for reading, by ranges of at least a MiB."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start=start, end=end))


def read_seconds(variable: str, default: float) -> float:
    """A length of time from the environment.

    Raises:
        StoreError: it is no number above 0.
    """
    text = os.environ.get(variable)
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise StoreError(f"{variable}: {text!r} is no number of seconds above 0; mend or unset it")
    return seconds
