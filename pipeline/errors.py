"""Everything a user can mend, as one tree.

    StillroomError
    ├── ConfigError       a config that cannot be read or asks for the impossible
    ├── DataError         a data set, column, label or example that does not fit
    ├── ModelError        a teacher or student that cannot be loaded or lacks a part
    ├── NumericalError    NaN or infinity, with the name of the example
    ├── StoreError        an object store that does not answer, or refuses
    ├── DiskError         a disk that is full, read-only, gone or failing
    ├── LockError         a folder in which another process is at work
    └── CacheError        a folder that is no cache, is unfinished or damaged
        └── MismatchError what a student or a continued capture brings differs from the manifest

A message is one line: the subject, what was found, what was expected, what to do. The commands
print it and exit with code 1; anything else that escapes them is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 300  # letters that are quoted of another error


class StillroomError(Exception):
    """Base of every error a user can mend."""


class ConfigError(StillroomError):
    """A config cannot be read, or asks for something that does not exist."""


class DataError(StillroomError):
    """A data set, column, label or example does not fit."""


class ModelError(StillroomError):
    """A teacher or student cannot be loaded, or lacks a part that was asked for."""


class NumericalError(StillroomError):
    """A number that should be finite is not."""


class StoreError(StillroomError):
    """An object store does not answer, however often it is asked, or refuses."""


class DiskError(StillroomError):
    """A disk is full, read-only, gone or failing."""


class LockError(StillroomError):
    """Another process is at work in a folder, or has taken it over."""


class CacheError(StillroomError):
    """A folder is no cache, or the cache in it is unfinished or damaged."""


class MismatchError(CacheError):
    """Two things that must be the same (tokenizer, data, teacher, ...) are not."""


def say(error: BaseException) -> str:
    """What somebody else's error says, on one line and not without end."""
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest option, or the options where none is near."""
    options = sorted(options)
    near = get_close_matches(name, options, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(options)}"
