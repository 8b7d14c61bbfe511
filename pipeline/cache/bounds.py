"""What the columns of a record batch may say, compared once for all examples of it.

Checksums tell of accidents; whoever writes a file on purpose mends them too. So every number that
is used as a place or as a count is compared with what it is a place in, and nothing is read from
elsewhere.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.targets import UNLABELLED


def require_values(buffer: object, dtype: str, count: int) -> np.ndarray:
    """[count] numbers of an Arrow buffer, in Arrow's memory.

    Raises:
        ValueError: the buffer is absent or too small.
    """
    if buffer is None:  # Arrow leaves out what would be empty
        if count:
            raise ValueError("a column without its values")
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, count)  # type: ignore[call-overload, no-any-return]


def require_no_nulls(columns: Sequence[object]) -> None:
    """Refuse nulls where the format has none: they would be read as whatever lies there.

    Args:
        columns: Arrow arrays.
    """
    if any(column.null_count for column in columns):  # type: ignore[attr-defined]
        raise ValueError("a column with nulls that may hold none")


def require_fitting(
    token_ends: np.ndarray,
    segments: np.ndarray,
    segment_ends: np.ndarray,
    target_ends: np.ndarray,
    positions: np.ndarray,
    labels: int,
) -> None:
    """Compare the lists of a record batch with one another.

    Args:
        token_ends, segment_ends, target_ends: [rows + 1], where the lists of each example begin and
            the last one ends.
        segments: lengths of segments.
        positions: of targets, among the tokens, the segments, or the `labels` that have names.

    Raises:
        ValueError: segments that do not sum to the tokens, or a target about nothing.
    """
    tokens, counts = np.diff(token_ends), np.diff(target_ends)
    if len(segments) and segments.min() < 0:
        raise ValueError("a segment of negative length")
    before = np.concatenate([[0], np.cumsum(segments, dtype=np.int64)])
    if not np.array_equal(before[segment_ends[1:]] - before[segment_ends[:-1]], tokens):
        raise ValueError("segment_lengths that do not sum to the number of tokens")
    most = np.repeat(np.maximum(tokens, np.diff(segment_ends)).clip(min=labels), counts)
    own = positions[target_ends[0] :]
    if ((own < 0) | (own >= most)).any():
        raise ValueError("a target about a position that the example does not have")


def require_numbers(tokens: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Compare token ids and labels with what they are numbers of.

    Raises:
        ValueError: negative ids, or a label of no class.
    """
    if len(tokens) and tokens.min() < 0:
        raise ValueError("negative token ids")
    known = ((labels >= 0) & (labels < num_classes)) | (labels == UNLABELLED)
    if not known.all():
        raise ValueError(f"a label outside [0, {num_classes:,})")


def require_features(
    starts: np.ndarray, counts: np.ndarray, tokens: np.ndarray, targets: np.ndarray
) -> None:
    """Compare the vectors that each example claims with what it has them for.

    Args:
        starts, counts: `feature_start` and `feature_count`; tokens, targets: T and N; [rows] each.

    Raises:
        ValueError: more vectors than tokens and targets, or fewer than none.
    """
    most = np.maximum(tokens, targets)
    if ((starts < 0) | (counts < 0) | (counts > most)).any():
        raise ValueError("vectors that no example has")
