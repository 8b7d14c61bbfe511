"""Names that strangers wrote, before they become paths.

name in a JSON file -- FileName, PlainName --> below the folder, by letters that mean nothing else
cache of a view -- Address --> a folder or a store of a known kind
folder of a cache -- require_own, file of a shard -- require_inside --> no link that leads out
"""

import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pipeline.errors import CacheError

_PLAIN = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,199}")
_STORES = ("file", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
_LONGEST_ADDRESS = 4096
_MOST_PARTS, _MOST_BYTES = 16, 255  # file systems and tools refuse longer names, some of them late


def _require_plain(name: str) -> str:
    if not _PLAIN.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no plain name; expected letters, digits, _ . + and -")
    return name


def _require_below(name: str) -> str:
    parts = name.split("/")
    if len(parts) > _MOST_PARTS or not all(map(_is_part, parts)):
        raise ValueError(f"{name[:80]!r} is no file below the folder; expected plain names and /")
    return name


def _is_part(name: str) -> bool:
    plain = name.isprintable() and not any(letter in name for letter in "\\:")
    return plain and name not in ("", ".", "..") and len(name.encode()) <= _MOST_BYTES


def _require_address(text: str) -> str:
    kind, separator, _ = text.partition("://")
    known = not separator or kind in _STORES
    if not known or not text.isprintable() or "::" in text or len(text) > _LONGEST_ADDRESS:
        raise ValueError(f"{text[:80]!r} is no folder and no store; expected {', '.join(_STORES)}")
    return text


PlainName = Annotated[str, AfterValidator(_require_plain)]
Address = Annotated[str, AfterValidator(_require_address)]
FileName = Annotated[str, AfterValidator(_require_below)]


def require_own(root: Path) -> None:
    """Refuse links out of a cache's folder wherever they stand, but in its shards, which compare
    their own files when they are opened.

    Raises:
        CacheError: see `require_inside`.
    """
    if isinstance(root, Path) and root.is_dir():
        require_inside(root, _find_links(root, {"shards"}))


def _find_links(folder: Path, without: Container[str] = ()) -> Iterator[Path]:
    for file in folder.iterdir():
        if file.is_symlink():
            yield file
        elif file.name not in without and file.is_dir():
            yield from _find_links(file)


def require_inside(root: Path, files: Iterable[Path]) -> None:
    """Refuse files that are links out of a cache's folder, or stand in a folder that is one.

    The links of a download from the hub lead to its own `blobs` and are none of these.

    Args:
        root: the folder; of an object store, which has no links, nothing is asked.

    Raises:
        CacheError: names the first of them.
    """
    if not isinstance(root, Path):
        return
    real = root.resolve()
    homes = [real, *(p.parent / "blobs" for p in real.parents if p.name == "snapshots")]
    for file in files:
        try:
            target = file.resolve()
        except (OSError, RuntimeError) as error:
            raise CacheError(f"{file}: is a link to itself; copy the cache again") from error
        if not any(target.is_relative_to(home) for home in homes):
            raise CacheError(
                f"{file}: is a link that leads out of the cache, to {str(target)!r}; copy the cache"
                " with the files themselves in place of links"
            )
