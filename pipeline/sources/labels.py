"""The label column of a data set, whatever its type, as class numbers and class names.

A label may be text, an integer, a truth value (0 and 1) or a `ClassLabel`; it is missing where it
is null or, for a ClassLabel, -1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from pipeline.errors import DataError, did_you_mean

Key = str | int


@dataclass(frozen=True)
class LabelSet:
    """Class names in order, and the class of every key that may stand in the column."""

    names: list[str]
    codes: Mapping[Key, int]

    def encode(self, cell: Any) -> Any:
        """The class number of a key, or those of a list of keys; None stays None."""
        if isinstance(cell, list):
            return [self.encode(key) for key in cell]
        return None if cell is None else self.codes[cell]


def read_label(feature: Any) -> Callable[[Any], Key | None]:
    """How to read one cell of a label column: its name or number, None where it is missing.

    Raises:
        DataError: the column's type cannot hold class labels.
    """
    if isinstance(feature, datasets.ClassLabel):
        return lambda cell: None if cell is None or cell < 0 else str(feature.int2str(cell))
    if isinstance(feature, datasets.Value):
        return _plain_label
    raise DataError(f"holds {type(feature).__name__}, expected text, integers or a ClassLabel")


def collect_labels(
    features: Sequence[Any], keys: Iterable[Key | None], names: list[str] | None
) -> LabelSet:
    """The label set: as configured, as a ClassLabel says, or the sorted set of what was found.

    Integers among configured names are positions, unless the names are themselves integers.
    """
    declared = next((f.names for f in features if isinstance(f, datasets.ClassLabel)), None)
    if names is None and declared is not None:
        names = list(declared)
    if names is None:
        found = sorted({key for key in keys if key is not None}, key=_sort_key)
        return LabelSet([str(key) for key in found], {key: i for i, key in enumerate(found)})
    codes: dict[Key, int] = {name: i for i, name in enumerate(names)}
    if all(_is_integer(name) for name in names):
        codes.update({int(name): i for i, name in enumerate(names)})
    else:
        codes.update({i: i for i in range(len(names))})
    return LabelSet(names, codes)


def complain_about(label: Key, row_id: str, subject: str, names: Sequence[str]) -> DataError:
    """The error for a label outside the label set."""
    return DataError(
        f"{subject}: row {row_id!r} has label {label!r}, which is not in label_names"
        f"{did_you_mean(str(label), names)}"
    )


def _plain_label(cell: Any) -> Key | None:
    if cell is None or cell != cell:  # a table read from CSV holds NaN where a cell is empty
        return None
    if isinstance(cell, bool) or (isinstance(cell, float) and cell.is_integer()):
        return int(cell)
    if isinstance(cell, str | int):
        return cell
    raise DataError(f"holds {cell!r}, expected text, integers or a ClassLabel")


def _sort_key(key: Key) -> tuple[bool, int, str]:
    return (True, 0, key) if isinstance(key, str) else (False, key, "")


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
