"""The files of a shard where they can be read: on this machine, or brought from a store.

    shards/NNNNN/ here                             -- hashed where they lie
    s3://.../shards/NNNNN/ -- one request a piece --> staging, hashed on the way

What is in a store is read once, for its checksum and for what it means; the copy goes with the
block.
"""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.cache.checksums import find_difference
from pipeline.cache.manifest import Files, ShardInfo, read_shard_hashed
from pipeline.cache.shards import SHARD
from pipeline.errors import CacheError, say
from pipeline.storage import SMALL_BYTES, fetch_file, is_local, list_files, staging

# A file whose name is a folder's too, as an object's may be, or one longer than any here.
_UNFIT = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def bringing(folder: Path) -> Iterator["Brought"]:
    """The files of a shard's folder, for as long as the block lasts."""
    near = folder
    with ExitStack() as stack:
        if not is_local(folder):
            with suppress(OSError):  # nothing can be written here: each is read where it is needed
                near = stack.enter_context(staging()) / "shards" / folder.name
        yield Brought(folder, near)


class Brought:
    """The files of one shard.

    Attributes:
        home: the shard's folder.
        folder: where its files are read, once they were looked at; home itself on this machine.
        sizes: bytes of every file of it, by name.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.sizes = list_files(home)

    def read_shard(self, require_seal: bool) -> tuple[ShardInfo, str]:
        """See `read_shard_hashed`; what comes torn from a store is asked for once more."""
        if self.home == self.folder:
            return read_shard_hashed(self.folder, require_seal)
        size = min(self.sizes[SHARD], SMALL_BYTES + 1)  # more of it is refused
        self._fetch(SHARD, size)
        with suppress(CacheError):
            return read_shard_hashed(self.folder, require_seal)
        self._fetch(SHARD, size)
        return read_shard_hashed(self.folder, require_seal)

    def find_difference(self, name: str, files: Files) -> str | None:
        """See `checksums.find_difference`; what comes torn from a store is asked for once more."""
        size, digest = files[name]
        if self.home == self.folder or self.sizes.get(name) != size:
            return find_difference(self.home, name, files, self.sizes)
        try:
            whole = digest == self._fetch(name, size) or digest == self._fetch(name, size)
        except OSError as error:
            if error.errno not in _UNFIT:
                raise
            return f"has a name that this machine cannot hold ({say(error)})"
        return None if whole else "fails its checksum"

    def _fetch(self, name: str, size: int) -> str:
        return fetch_file(self.home / name, self.folder / name, size)
