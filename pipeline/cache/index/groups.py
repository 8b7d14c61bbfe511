"""The rows of each value of a column: of a language, a source, a topic.

    column, one Arrow array after the other -> group_rows -> value -> RowRuns -> locate -> places
    index/columns/<hash of the name>.arrow   the same runs, written with the cache

Rows are held as runs, which take little where rows of one value stand together; where they
alternate, three numbers for each row.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.index.splits import RUNS, RowRuns, hash_id, read_table, write_table

MOST_GROUPS = 10_000  # more values are no groups but texts or ids


def write_groups(path: Path, column: str, groups: Mapping[str, RowRuns]) -> None:
    """Write the index of a column."""
    names = [name for name, rows in groups.items() for _ in rows.starts]
    table = {
        "value": pa.array(names, pa.large_string()),
        "first_row": np.concatenate([rows.starts for rows in groups.values()]),
        "rows": np.concatenate([rows.counts for rows in groups.values()]),
    }
    write_table(path / name_index(column), pa.table(table))


def read_groups(path: Path, column: str) -> dict[str, RowRuns] | None:
    """What `write_groups` wrote; None where it did not.

    Raises:
        CacheError: the file is damaged.
    """
    file = path / name_index(column)
    if not file.is_file():
        return None
    table = read_table(file, {"value": pa.large_string(), **RUNS})
    coded = table["value"].combine_chunks().dictionary_encode()
    codes, starts, counts = (
        array.to_numpy() for array in (coded.indices, table["first_row"], table["rows"])
    )
    first = np.searchsorted(codes, np.arange(len(coded.dictionary) + 1))  # runs of one value follow
    return {
        name: RowRuns(starts[begin:end], counts[begin:end])
        for name, begin, end in zip(coded.dictionary.to_pylist(), first, first[1:], strict=False)
    }


def group_rows(arrays: Iterable[Any]) -> dict[str, RowRuns] | None:
    """Rows by the value of a column, as text, in the order of the texts; a null is "None".

    Args:
        arrays: the column, as Arrow arrays one after the other; no more is read of it than
            shows that it has too many values.

    Returns:
        None where there are more than MOST_GROUPS values, or where they are lists.
    """
    codes: dict[str, int] = {}
    starts, values, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for array in arrays:
        if pa.types.is_nested(array.type):
            return None
        coded = array.dictionary_encode(null_encoding="encode")
        names = [str(value) for value in coded.dictionary.to_pylist()]
        own = np.array([codes.setdefault(name, len(codes)) for name in names], dtype=np.int64)
        if len(codes) > MOST_GROUPS:
            return None
        found = own[coded.indices.to_numpy()]
        first = np.flatnonzero(np.diff(found, prepend=-1))
        starts.append(rows + first)
        values.append(found[first])
        rows += len(array)
    return _join_runs(np.concatenate(starts), np.concatenate(values), rows, codes)


def _join_runs(
    starts: np.ndarray, values: np.ndarray, rows: int, codes: dict[str, int]
) -> dict[str, RowRuns]:
    changes = np.diff(values, prepend=-1) != 0  # a run may go on in the next array
    starts, values = starts[changes], values[changes]
    counts = np.diff(starts, append=rows)
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(np.bincount(values, minlength=len(codes)))
    groups = {}
    for name, code in sorted(codes.items()):
        mine = order[ends[code - 1] if code else 0 : ends[code]]
        groups[name] = RowRuns(starts[mine], counts[mine])
    return groups


def locate(rows: RowRuns, chosen: RowRuns) -> RowRuns:
    """The places in `chosen` at which those of the rows stand that are in it.

    Both are cut at the ends of either, so that each piece is in one or not as a whole.
    """
    edges = np.unique(np.concatenate([_edges(rows), _edges(chosen)]))
    pieces, ends = edges[:-1], edges[1:]
    shared = (count_before(rows, ends) - count_before(rows, pieces)) > 0
    places = count_before(chosen, pieces)
    shared &= count_before(chosen, ends) > places
    return RowRuns(places[shared], (ends - pieces)[shared])


def compose(rows: RowRuns, places: RowRuns) -> RowRuns:
    """The rows at some places of these rows: `rows[places]`, held as runs all the way."""
    edges = np.unique(np.concatenate([_edges(places), np.cumsum(rows.counts)]))
    pieces, ends = edges[:-1], edges[1:]
    wanted = count_before(places, ends) > count_before(places, pieces)
    return RowRuns(rows[pieces[wanted]], (ends - pieces)[wanted])


def join_runs(parts: Sequence[RowRuns], starts: Sequence[int]) -> RowRuns:
    """Rows of several parts end to end, each counted on from where its part starts."""
    none = np.zeros(0, dtype=np.int64)
    moved = [part.starts + start for part, start in zip(parts, starts, strict=True)]
    counts = [part.counts for part in parts]
    return RowRuns(np.concatenate([none, *moved]), np.concatenate([none, *counts]))


def name_index(column: str) -> str:
    """The path of a column's index in the cache."""
    # By hash: any text may name a column, and not every file system tells "lang" from "Lang".
    return f"index/columns/{hash_id(column):016x}.arrow"


def _edges(runs: RowRuns) -> np.ndarray:
    return np.concatenate([runs.starts, runs.starts + runs.counts])


def count_before(runs: RowRuns, rows: np.ndarray) -> np.ndarray:
    """[n] int64, how many of the runs' rows are smaller than each of these."""
    if not len(runs.starts):
        return np.zeros_like(rows)
    at = np.searchsorted(runs.starts, rows, side="right") - 1  # -1: before the first of them
    before = np.cumsum(runs.counts) - runs.counts
    inside = np.minimum(rows - runs.starts[at], runs.counts[at])
    return np.where(at < 0, 0, before[at] + inside)
