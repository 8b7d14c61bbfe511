"""What the dump of somebody else's teacher is: a format that turns its rows into records.

    file -- read_rows --> row -- Dump.records --> Record: tokens, and per position ids and log p

A format is its own configuration and says what its numbers are: of which token, at which
temperature, of which part of the distribution.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import StrictModel
from pipeline.errors import DataError
from pipeline.exchange.containers import Row
from pipeline.exchange.plain import Ragged
from pipeline.targets import UNLABELLED
from pipeline.tasks.prompting import template_ids

ABSENT = -9999.0  # what servers write in place of -inf; nothing is below


@dataclass(frozen=True)
class Draws:
    """What our own plain columns hold beyond log-probabilities at T = 1, see `Targets`.

    Attributes:
        logsumexp: [N, temperatures]; ids, log_probs: [N, R].
    """

    logsumexp: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Record:
    """One text, and what was said about it.

    Attributes:
        example_id: None where the dump has no names; then its file and number are one.
        input_ids: [T] int64.
        segment_lengths: documents, which sum to T.
        positions: [N] int64, ascending; the distribution of a row is that of the token after its
            position.
        label_ids: [N] int64, UNLABELLED where the text does not tell.
        ids, log_probs: N lists each, natural logarithms; -inf for what is not there.
        label_log_probs: [N] float64, nan where it is not told beside the entries.
        unnamed: entries that no id could be found for, and that were left out.
        draws: of our own plain columns.
    """

    example_id: str | None
    input_ids: np.ndarray
    segment_lengths: np.ndarray
    positions: np.ndarray
    label_ids: np.ndarray
    ids: Ragged
    log_probs: Ragged
    label_log_probs: np.ndarray | None = None
    unnamed: int = 0
    draws: Draws | None = None


@dataclass(frozen=True)
class Facts:
    """What a dump as a whole says of its rows; what it leaves open has a default.

    Attributes:
        temperatures: those at which its records are exact.
        tail_draws: R.
        task: the task's settings; None for language modelling.
        shifted, label_names, num_classes: see `Draft`; num_classes None where it is not told.
        id_room: ids up to this many could be written; None where there is no limit.
        columns: carried column -> field of a row, where the dump says which it has.
        origin: of a cache that was exported: its digest, identity, and what it was imported from.
        skipped: example id -> why its teacher did not answer it.
    """

    temperatures: tuple[float, ...] = (1.0,)
    tail_draws: int = 0
    task: Mapping[str, Any] | None = None
    shifted: bool = True
    label_names: list[str] | None = None
    num_classes: int | None = None
    id_room: int | None = None
    columns: Mapping[str, str] | None = None
    origin: Mapping[str, Any] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


class Dump(StrictModel, ABC):
    """A member of the family: its own configuration.

    Attributes:
        id_field: the field that names an example, unique in all files.
        temperature: the log-probabilities are those of softmax(logits / temperature) over all
            classes. A cache of another than 1 holds the distribution at this temperature alone, as
            if it were the teacher's own, and says so.
    """

    open_questions: ClassVar[tuple[str, ...]]  # what the format does not tell of its numbers

    name: str
    id_field: str | None = None
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def prepare(self, files: Sequence[Path]) -> Self:
        """The format with what stands beside the files.

        Raises:
            StillroomError: something that is needed is not there.
        """
        return self

    def facts(self, files: Sequence[Path]) -> Facts:
        """What the files as a whole say."""
        return Facts()

    @abstractmethod
    def records(self, row: Row, tokenizer: Any) -> Iterator[Record]:
        """The records of a row; none where it holds no answer.

        Args:
            tokenizer: a transformers tokenizer.

        Raises:
            DataError, ValueError, TypeError, LookupError: it is no row of this format; the reader
                adds which one.
        """


def take(row: Row, name: str) -> Any:
    """A field of a row.

    Raises:
        DataError: it has none of that name, or a null.
    """
    if name not in row:
        raise DataError(f"has no {name!r} among {', '.join(row)}; give the format of these files")
    value = row[name]
    if value is None or (isinstance(value, pa.Scalar) and not value.is_valid):
        raise DataError(f"has a null in {name!r}; leave it out, or make it again")
    return value


def read_chat(messages: Any, tokenizer: Any, **options: Any) -> np.ndarray:
    """The tokens of a chat, [T].

    Raises:
        DataError: the tokenizer has no template for it.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "is a chat, but the tokenizer has no chat template; give a chat model's tokenizer, or"
            " rows with input_ids"
        )
    return np.array(template_ids(messages, tokenizer, **options), dtype=np.int64)


def next_tokens(
    input_ids: np.ndarray, segment_lengths: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """[N] the token after each position, UNLABELLED at the end of a document."""
    labels = np.full(len(input_ids), UNLABELLED, dtype=np.int64)
    labels[:-1] = input_ids[1:]
    ends = np.cumsum(segment_lengths) - 1
    labels[ends[ends >= 0]] = UNLABELLED
    following: np.ndarray = labels[positions]
    return following
