"""A student's own examples beside what the teacher said of the same ids.

own examples -- example id --> cache -- Task.align --> CachedExample
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pipeline.cache import TeacherCache
from pipeline.errors import DataError, MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.identity import digest_tokenizer
from pipeline.safe_loading import open_tokenizer
from pipeline.tasks import Task


class JoinedExamples:
    """The student's own examples, each with what the teacher said of its id.

    Raises:
        DataError: an example whose id the teacher never saw.
    """

    def __init__(
        self, cache: TeacherCache, task: Task, examples: Sequence[Example], tokenizer: Any
    ):
        self.cache = cache
        self.task = task
        self.examples = examples
        self.tokenizer = tokenizer
        for example in examples:
            if example.example_id not in cache:
                raise DataError(
                    f"inputs: example {example.example_id!r} is not in {cache.path}; choose the"
                    " column that holds the cached ids with inputs.columns.id"
                )

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def _teacher_tokenizer(self) -> Any:
        return load_tokenizer(self.cache)

    def __getitem__(self, index: int) -> CachedExample:
        own = self.examples[index]
        said = self.cache.by_id(own.example_id)
        return self.task.align(own, said, self.tokenizer, self._teacher_tokenizer)


def load_tokenizer(cache: TeacherCache) -> Any:
    """The tokenizer of a cache's teacher; see `open_tokenizer`.

    Raises:
        MismatchError: it is not the one that the cache was made with.
    """
    tokenizer = open_tokenizer(cache.tokenizer_path)
    known, found = cache.manifest.identity.tokenizer["digest"], digest_tokenizer(tokenizer)
    # Caches from before tell less of a tokenizer in Python.
    if found != known and hasattr(tokenizer, "backend_tokenizer"):
        raise MismatchError(
            f"{cache.tokenizer_path}: is tokenizer {found[:8]}…, but the cache was made with"
            f" {str(known)[:8]}…; copy its folder tokenizer again"
        )
    return tokenizer
