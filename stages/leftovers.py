"""What a capture needs only while it runs, and a process that was killed leaves in a cache.

finished cache -- find_leftovers --> files --> remove_leftovers, if nobody is at work there
"""

from contextlib import suppress
from pathlib import Path

from pipeline.cache.manifest import DRAFT, DRAFTS, MANIFEST
from pipeline.errors import LockError
from pipeline.locking.locks import LOCKS, occupy
from pipeline.storage import is_local, remove_file, remove_tree, scratch_folder

_SCRATCH = ("examples.arrow", "generated.jsonl", "*.draft")


def find_leftovers(cache: Path) -> list[Path]:
    """The files of a finished cache that nobody needs any more, and the folder of drafts."""
    scratch = scratch_folder(cache)
    drafts = [cache / DRAFT, *([cache / DRAFTS] if is_local(cache) else [])]
    found = [draft for draft in drafts if draft.exists()]
    return [*found, *(file for pattern in _SCRATCH for file in sorted(scratch.glob(pattern)))]


def remove_leftovers(cache: Path) -> None:
    """Remove them, and the locks of the dead; whoever still works there does so itself.

    A cache that cannot be written keeps them: they harm nobody. One that is not finished yet needs
    them.
    """
    if not (cache / MANIFEST).is_file():
        return
    if find_leftovers(cache) or (cache / LOCKS).exists():
        # Beside others, so that one that begins now is not refused: it finds the manifest.
        with (
            suppress(LockError, OSError),
            occupy(cache, "cache-teacher", shared=True) as here,
            # All that is held while a file is written; another process may still be at its last.
            here.hold("texts"),
            here.hold("beginning"),
            here.hold("capture"),
        ):
            for file in find_leftovers(cache):
                (remove_tree if file.is_dir() else remove_file)(file)
