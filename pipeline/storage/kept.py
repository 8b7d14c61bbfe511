"""What was read from a store, kept in a folder of this machine until others need the room.

    <STILLROOM_CACHE_DIR>/ranges/<2 digits>/<30 digits>   the bytes, then their CRC-32C

Processes may share the folder: a file appears by rename, and whoever finds one gone asks the store.
A key names content that never changes, so nothing here is ever out of date. The oldest use goes
first. That the folder cannot be written is no error: it only saves time.
"""

import hashlib
import os
import secrets
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa

from pipeline.errors import StoreError

FOLDER_VARIABLE = "STILLROOM_CACHE_DIR"
BYTES_VARIABLE = "STILLROOM_CACHE_BYTES"
_BYTES = 8 * 2**30
_DRAFT = ".draft"
_FORGOTTEN = 3600  # seconds after which a draft has nobody who writes it
_RECENTLY = 60  # seconds in which a second use is not written down
_CHECKSUM = 4


def local_root() -> Path:
    """The folder of this machine for what belongs to caches elsewhere."""
    home = os.environ.get(FOLDER_VARIABLE)
    return Path(home) if home else Path.home() / ".cache" / "stillroom"


def kept_ranges() -> "Kept":
    """The folder that the environment names.

    Raises:
        StoreError: STILLROOM_CACHE_BYTES is no number.
    """
    # By what they say: this is asked for each range, and a path takes as long as to read one.
    texts = (os.environ.get(name) for name in (FOLDER_VARIABLE, BYTES_VARIABLE, "HOME"))
    return _open(*texts)


class Kept:
    """At most `limit` bytes of content by key.

    Attributes:
        folder: where.
        limit: bytes; with 0 nothing is kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._root = str(folder)
        self._unseen = limit  # bytes that were written since the folder was last looked through

    def get(self, key: str, compare: bool = True, size: int | None = None) -> Any | None:
        """The content, as a buffer; None where it is not kept or has suffered.

        Args:
            compare: it with its checksum; whoever knows it by another need not.
            size: its bytes, where they are known.
        """
        try:
            descriptor = os.open(self._at(key), os.O_RDONLY)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            content = os.read(descriptor, status.st_size)
            if time.time() - status.st_mtime > _RECENTLY:
                os.utime(descriptor)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        found = len(content) - _CHECKSUM
        if found < 0 or size not in (None, found):
            return None
        body = pa.py_buffer(content).slice(0, found)
        return None if compare and _sum(body) != content[-_CHECKSUM:] else body

    def holds(self, key: str) -> bool:
        """Whether content is kept; it may have suffered."""
        return os.access(self._at(key), os.R_OK)

    def put(self, key: str, content: bytes) -> None:
        """Keep content, and let go of what was not used for longest."""
        if len(content) > self.limit // 16:
            return
        path = Path(self._at(key))
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_DRAFT}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb", buffering=0) as opened:
                opened.write(content)
                opened.write(_sum(content))
            draft.replace(path)
        self._unseen += len(content) + _CHECKSUM
        if self._unseen > self.limit // 16:
            self._unseen = 0
            self._make_room()

    def drop(self, key: str) -> None:
        """Forget content."""
        with suppress(OSError):
            Path(self._at(key)).unlink()

    def _at(self, key: str) -> str:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return f"{self._root}/{name[:2]}/{name[2:]}"

    def _make_room(self) -> None:
        # Of several processes each may write a sixteenth more before it looks.
        found = []
        with suppress(OSError):
            for entry in (file for rack in self.folder.iterdir() for file in os.scandir(rack)):
                with suppress(OSError):
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        wanted = self.limit * 7 // 8
        now = time.time()
        for used, size, path in sorted(found):
            stale = path.endswith(_DRAFT) and now - used > _FORGOTTEN
            if not stale and (total <= wanted or path.endswith(_DRAFT)):
                continue
            with suppress(OSError):
                Path(path).unlink()
            total -= size


@lru_cache(maxsize=8)
def _open(folder: str | None, limit: str | None, _home: str | None) -> Kept:
    text = limit or str(_BYTES)
    if not text.isdecimal():
        raise StoreError(f"{BYTES_VARIABLE}: {text!r} is no number of bytes; mend or unset it")
    return Kept(local_root() / "ranges", int(text))


def _sum(content: Any) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(_CHECKSUM, "little")
