"""A disk that fails, told in one line: which file, why, what is safe and how to go on.

any error of a stage -> the file and the reason, and a note of what stands -> DiskError

The libraries of a stage write too and say it each in its own way: Python and pyarrow by an OSError,
safetensors by a text, PyTorch by a RuntimeError that has forgotten the reason.
"""

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipeline.errors import DiskError, StillroomError, say

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

_REMEDIES = {
    "make room": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "make the folder writable": (errno.EROFS,),
    "see to who may read and write there": (errno.EACCES, errno.EPERM),
    "allow more open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "bring the folder back": (errno.ENOENT, errno.ENOTDIR, errno.ESTALE),
    "look after the disk": (errno.EIO, errno.ENODEV, errno.ENXIO),
}
_KNOWN = {number: remedy for remedy, numbers in _REMEDIES.items() for number in numbers}
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
_AGAIN = "run the same command again"
_SAFE = "what is finished is safe"
_WRITERS = ("torch/serialization.py", "pyarrow/", "safetensors/")


def tells_of_disk(
    describe: Callable[Arguments, tuple[Path, str]],
) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    """A decorator for a stage: what the disk refuses becomes one line.

    Args:
        describe: the stage's arguments -> the folder that it writes, and what is safe by now.
    """

    def decorate(stage: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        @wraps(stage)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            try:
                return stage(*args, **kwargs)
            except Exception as error:
                if isinstance(error, StillroomError) and not _lacks_remedy(error):
                    raise
                folder, safe = None, _SAFE
                with suppress(OSError):  # of a disk that fails, not even that can be told
                    folder, safe = describe(*args, **kwargs)
                told = tell_of_disk(error, folder, safe)
                if told is error:  # raised from itself, it would have no end
                    raise
                raise told from error

        return run

    return decorate


def tell_of_disk(error: Exception, folder: Path | None = None, safe: str = _SAFE) -> Exception:
    """The error as one line; itself where no disk is to blame for it.

    Args:
        folder: that was being written.
        safe: what is.
    """
    if isinstance(error, StillroomError):
        return _add_remedy(error, safe) if _lacks_remedy(error) else error
    for cause in _order(_causes(error)):
        if isinstance(cause, StillroomError):
            return cause
        found = _find_refusal(cause)
        if found is not None:
            reason, remedy = found
            named = getattr(cause, "filename", None) or folder or "the disk"
            told = f"{named}: cannot be used ({reason})"
            return DiskError(f"{told}; {safe}, {remedy} and {_AGAIN} to continue")
        if _was_reading(cause):
            return DiskError(
                f"{folder or 'a run'}: holds a checkpoint that cannot be read ({say(cause)});"
                f" delete the newest in its folder checkpoints and {_AGAIN} to go on from the rest"
            )
    return error


def _lacks_remedy(error: StillroomError) -> bool:
    """Whether it quotes what a machine has run out of, without what to do about it."""
    remedy = _find_remedy(str(error), _EXHAUSTED)
    return remedy is not None and remedy not in str(error)


def _add_remedy(error: StillroomError, safe: str) -> StillroomError:
    text, remedy = str(error), _find_remedy(str(error), _EXHAUSTED)
    if _AGAIN in text:
        return type(error)(text.replace(_AGAIN, f"{remedy} and {_AGAIN}", 1))
    return type(error)(f"{text}; {safe}, {remedy} and {_AGAIN} to continue")


def _find_remedy(text: str, numbers: Iterable[int]) -> str | None:
    """What to do about the first of these errors whose name a text quotes."""
    return next((_KNOWN[n] for n in numbers if os.strerror(n) in text), None)


def _order(causes: Iterable[BaseException]) -> list[BaseException]:
    """The first error before those that came of it. A folder that may not be made was looked for
    before, in vain."""
    found = list(causes)[::-1]
    if any(isinstance(e, OSError) and e.errno in _FORBIDDEN for e in found):
        return [error for error in found if not isinstance(error, FileNotFoundError)]
    return found


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _find_refusal(error: BaseException) -> tuple[str, str] | None:
    """The reason and what to do about it, None where no disk refused."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told.group(1))
    if number in _KNOWN:
        return os.strerror(number), _KNOWN[number]
    if isinstance(error, OSError | RuntimeError) and _was_writing(error):
        text = " ".join(str(error).split())
        reason = text.rpartition("strerror: ")[2].rstrip(". ")
        otherwise = "bring the folder back" if "does not exist" in reason else "make room"
        return reason, _find_remedy(reason, _KNOWN) or otherwise
    return None


def _was_writing(error: BaseException) -> bool:
    """Whether a library that writes files raised it."""
    last = next(_trace(error), ("", ""))[0]
    return any(writer in last for writer in _WRITERS) and not _was_reading(error)


def _was_reading(error: BaseException) -> bool:
    """Whether torch raised it while it read a file of its own: nothing else here is one."""
    return any(
        file.endswith("torch/serialization.py") and name == "load" for file, name in _trace(error)
    )


def _trace(error: BaseException) -> Iterator[tuple[str, str]]:
    """The functions that it came through, by file and name; where it was raised first."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return ((code.co_filename, code.co_name) for code in reversed(frames))


def count_shards(cache: Path) -> str:
    """What is safe of a cache under way."""
    count = sum(1 for _ in cache.glob("shards/*/shard.json")) if cache.is_dir() else 0
    return f"{count or 'no'} {'shard is' if count == 1 else 'shards are'} safe"


def name_checkpoint(run: Path) -> str:
    """What is safe of a run under way."""
    if not (run / "config.yaml").is_file():  # without it, the next start begins anew
        return "none of the run is there"
    saved = [file.parent.name for file in run.glob("checkpoints/**/trainer_state.json")]
    ended = [file.parent.name for file in run.glob("checkpoints/*/stage.json")]
    if saved:
        steps = max(int(name.rpartition("-")[2]) for name in saved)
        return f"its last checkpoint (step {steps:,}) is safe"
    return f"what it learned in {', '.join(sorted(ended))} is safe" if ended else "nothing is lost"
