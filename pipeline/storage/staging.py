"""Folders of this machine for what belongs to a store: on its way there, or copied from it.

    <STILLROOM_CACHE_DIR>/staging/<token>, <token>.lock    one for each process and thing under way
    <STILLROOM_CACHE_DIR>/<digest of an address>/          waits for one cache: see `scratch_folder`

A staging folder goes with the block that uses it. Where the process was killed its lock is free,
and whoever stages next removes it: what lies here is never more than what is under way.
"""

import fcntl
import hashlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage.kept import local_root
from pipeline.storage.places import is_local

_LOCK = ".lock"


@contextmanager
def staging() -> Iterator[Path]:
    """An empty folder, gone at the end of the block or, after a kill, when the next one begins."""
    root = local_root() / "staging"
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    folder = root / secrets.token_hex(8)
    claim = folder.with_suffix(_LOCK)
    with claim.open("wb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            claim.unlink(missing_ok=True)


def scratch_folder(path: Path) -> Path:
    """Where files that wait for a folder lie: in it, or at one place of this machine for each."""
    if is_local(path):
        return path
    return local_root() / hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()


def _sweep(root: Path) -> None:
    """Remove what dead processes left."""
    for claim in root.glob(f"*{_LOCK}"):
        with suppress(OSError), claim.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by whoever lives
            shutil.rmtree(claim.with_suffix(""), ignore_errors=True)
            claim.unlink(missing_ok=True)
