"""A text corpus that every machine has: the source of Python's own standard library.

Files are dealt to three splits by a hash of their path, so that one file is held out on every
machine and in every Python version: `teacher` (what a teacher learns), `transfer` (what it is
asked about, for students) and `test` (what nobody trains on).
"""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Left out: what Linux distributions strip or ship separately, and generated tables.
_SKIPPED = {
    "__phello__",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
}
_SHARES = (("teacher", 80), ("transfer", 93), ("test", 100))  # upper bounds in percent


def stdlib_rows(library: Path | None = None) -> Iterator[dict[str, str]]:
    """Yield {"id": path inside the library, "split", "text"} for each source file, sorted by path.

    Args:
        library: the folder to read; this interpreter's standard library by default.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if _is_skipped(inside.parts):
            continue
        try:
            with tokenize.open(path) as file:  # honours the file's own encoding line
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield {"id": inside.as_posix(), "split": _split(inside.as_posix()), "text": text}


def _is_skipped(parts: tuple[str, ...]) -> bool:
    return any(part in _SKIPPED or part.startswith("config-") for part in parts)


def _split(path: str) -> str:
    percent = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest()) % 100
    return next(name for name, bound in _SHARES if percent < bound)
