"""Bytes and names brought to the disk, so that they are there after a power cut."""

import os
from pathlib import Path

from pipeline.storage.places import is_local


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
