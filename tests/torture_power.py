"""What a power cut would show: everything a commit speaks of is on the disk before the commit is.

operations of an uninterrupted run -- find_unsafe --> sentences about those in a wrong order
"""

import re
from collections.abc import Sequence
from pathlib import Path

from torture_syscalls import Operation

_COMMITS = {  # a file that makes others count, by its name -> the folder of these others, from it
    "shard.json": ".",
    "manifest.json": ".",
    "stage.json": ".",
    "result.json": ".",
}
# Files that are made anew where they are missing or cut off, and what belongs to other commits.
_FREE = re.compile(
    r"capture\.json|/locks(/|$)|examples\.arrow|generated\.jsonl|\.draft$|\.partial$|/checkpoints(/|$)"
)


def find_unsafe(operations: Sequence[Operation], root: Path) -> list[str]:
    """Each wrong order of a run, once.

    Data count as safe from fsync of their file on, a name from fsync of its folder on.
    """
    files: set[str] = set()
    folders: set[str] = set()
    found: dict[str, None] = {}
    for operation in operations:
        path, parent = operation.path, str(Path(operation.path).parent)
        if operation.kind in ("write", "truncate"):
            files.add(path)
        elif operation.kind == "sync":
            files.discard(path)
            folders.discard(path)
        elif operation.kind in ("open", "mkdir"):
            folders.add(parent)
        elif operation.kind in ("unlink", "rmdir"):
            found |= dict.fromkeys(_removed_too_early(path, files | folders))
            files.discard(path)
            folders.discard(path)
        elif operation.kind == "rename":
            found |= dict.fromkeys(_committed_too_early(operation, files, folders, root))
            if path in files:
                files.remove(path)
                files.add(operation.target)
            folders.add(str(Path(operation.target).parent))
    return list(found)


def _committed_too_early(
    operation: Operation, files: set[str], folders: set[str], root: Path
) -> list[str]:
    target = Path(operation.target)
    name = target.relative_to(root)
    draft = operation.path.endswith(".draft") and operation.path in files
    told = [f"{name} is renamed before its bytes are safe"] if draft else []
    if target.name in _COMMITS:
        base = f"{target.parent}/"
        unsafe = [p for p in files | folders if p.startswith(base) and not _FREE.search(p)]
        told += [f"{name} stands before {Path(p).relative_to(root)} does" for p in sorted(unsafe)]
    return told


def _removed_too_early(path: str, unsafe: set[str]) -> list[str]:
    """A checkpoint goes, or a draft, before what takes its place is safe."""
    removed = Path(path)
    if "/checkpoints/" in path:
        run, _, below = path.partition("/checkpoints/")
        own = f"{run}/checkpoints/{below.partition('/')[0]}"
        waiting = [p for p in unsafe if "/checkpoint-" in p and not p.startswith(own)]
    elif removed.name == "draft.json":
        waiting = [p for p in unsafe if p == str(removed.parent)]
    else:
        return []
    return [f"{removed.parent.name}/{removed.name} goes before {p} is safe" for p in waiting]
