"""A process that may open only a few files more than it has open."""

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice


@contextmanager
def few_files(spare: int) -> Iterator[None]:
    """Let this process open so many files more, until the block ends."""
    gc.collect()  # a file that garbage holds open might be closed in the block, and be one more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (number for number in count() if not _is_open(number))
    limit = next(islice(free, spare, None))  # the first number that is too many
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
