"""A file that is created whole, by one process of however many try."""

import os
import secrets
from pathlib import Path

from pipeline.storage import create_object, is_local


def create_exclusively(path: Path, content: bytes) -> bool:
    """Create a file with its content, if there is none; of several at once, one succeeds.

    Each process brings another content: it is by this that one knows its own object in a store.
    """
    if not is_local(path):
        return create_object(path, content)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.draft")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(content)
            return _link(draft, path, content)
        except FileNotFoundError:  # the last one to leave removed the folder meanwhile
            continue
        finally:
            draft.unlink(missing_ok=True)


def _link(draft: Path, path: Path, content: bytes) -> bool:
    """Give the draft a second name, so that the file is never there without its content."""
    try:
        os.link(draft, path)
    except FileNotFoundError:
        raise
    except FileExistsError:
        return draft.stat().st_nlink > 1  # a network's disk may repeat what it has done
    except OSError:  # a disk without links
        return _create(path, content)
    return True


def _create(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True
