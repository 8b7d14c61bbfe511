"""Files of rows, whatever they hold: Parquet in batches, or a JSON object on each line.

    file -- read_rows --> {field: JSON value | Arrow scalar} -- numbers, matrix, plain --> arrays

Lists of numbers of a Parquet file never become Python objects.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyarrow import parquet

from pipeline.errors import DataError
from pipeline.exchange.plain import Ragged

Row = Mapping[str, Any]

_PARQUET = (".parquet",)
_LINES = (".jsonl", ".ndjson", ".json")
_BATCH = 64  # rows of a Parquet file that are in memory at one time


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file in order.

    Raises:
        DataError: no such file, another ending, or bytes that are neither.
    """
    if file.suffix in _PARQUET:
        rows = _read_parquet(file)
    elif file.suffix in _LINES:
        rows = _read_lines(file)
    else:
        raise DataError(
            f"{file}: ends in {file.suffix!r}, expected {', '.join(_PARQUET + _LINES)}; choose"
            " the dump's files"
        )
    try:
        yield from rows
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read ({reason}); give a whole file") from error


def plain(value: Any) -> Any:
    """A field as JSON values."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def numbers(value: Any, dtype: Any) -> np.ndarray:
    """A list of numbers, [n]; a null among floats is nan.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, pa.Scalar):
        if not isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
            raise ValueError(f"expected a list of numbers, found {value.type}")
        return _flat(value.values, dtype)
    return _convert(np.array([] if value is None else value), dtype)


def matrix(value: Any, dtype: Any) -> Ragged:
    """A list of lists of numbers.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, pa.Scalar):
        inner = value.values
        lengths = pa.compute.list_value_length(inner).fill_null(0).to_numpy(zero_copy_only=False)
        return Ragged(_flat(inner.flatten(), dtype), lengths.astype(np.int64))
    rows = [[] if row is None else row for row in value]
    values = [number for row in rows for number in row]
    return Ragged(numbers(values, dtype), np.array([len(row) for row in rows], dtype=np.int64))


def _flat(values: Any, dtype: Any) -> np.ndarray:
    return _convert(values.to_numpy(zero_copy_only=False), dtype)


def _convert(found: np.ndarray, dtype: Any) -> np.ndarray:
    if found.ndim != 1 or found.dtype.kind not in "iufO":
        raise ValueError(f"expected a list of numbers, found {found.dtype} of shape {found.shape}")
    if np.issubdtype(dtype, np.integer) and len(found) and found.dtype.kind not in "iu":
        raise ValueError("expected whole numbers, and no nulls among them")
    return found.astype(dtype)


def _read_parquet(file: Path) -> Iterator[Row]:
    with file.open("rb") as source, parquet.ParquetFile(source) as content:
        for batch in content.iter_batches(batch_size=_BATCH):
            names = batch.schema.names
            for row in range(batch.num_rows):
                yield {name: batch.column(name)[row] for name in names}


def _read_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as source:
        for number, line in enumerate(source, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{file}: line {number} is no JSON ({error}); give one JSON object per line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{file}: line {number} holds {type(row).__name__}, expected an object; give"
                    " one JSON object per line"
                )
            yield row
