"""A source becomes tables, one per split:

source -> builder, folder, hub or our own -> {source split: Dataset} -> splits -> Opened
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.sources.config import DataConfig

FOLDER_VARIABLE = "STILLROOM_DATA"
Table = Any  # datasets.Dataset, which ships without types

_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
_ENDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
    ".arrow": ("arrow", {}),
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Opened:
    """Tables by our split name, and what the source itself knows of its columns.

    Attributes:
        tables: our split -> Arrow-backed rows.
        columns: canonical column -> source column, before the config's own mapping.
    """

    tables: Mapping[str, Table]
    columns: Mapping[str, str] = field(default_factory=dict)


def open_dataset(config: DataConfig) -> Opened:
    """Open whatever `datasets` can load, or a folder that `save_to_disk` wrote.

    Raises:
        ConfigError: a builder without files.
        DataError: a file, configuration or split that is not there, or data that cannot be read.
    """
    loaded = [_load(config, name) for name in config.names]
    columns = {}
    if isinstance(config.name, list):
        loaded = [
            {split: with_constant(table, config.name_column, name) for split, table in one.items()}
            for one, name in zip(loaded, config.name, strict=True)
        ]
        columns = {config.name_column: config.name_column}
    common = [split for split in loaded[0] if all(split in one for one in loaded)]
    joined = {split: join_tables([one[split] for one in loaded]) for split in common}
    if any("." in column for column in config.columns.values()):
        joined = {split: table.flatten() for split, table in joined.items()}
    if config.split_column is not None:
        joined = _split(join_tables(list(joined.values())), config.split_column, config.source)
    return Opened(pick_splits(joined, config), columns)


def pick_splits(tables: Mapping[str, Table], config: DataConfig) -> dict[str, Table]:
    """Our splits from the source's, slices included.

    Raises:
        DataError: a split that the source does not have (with those it has).
    """
    return {ours: _pick(tables, spec, config.source) for ours, spec in config.splits.items()}


def split_by_column(table: Table, column: str) -> dict[str, Table]:
    """One table per value of a column, in order of first appearance."""
    values = table[column]
    rows: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        rows.setdefault(value, []).append(index)
    return {value: table.select(indices) for value, indices in rows.items()}


def _split(table: Table, column: str, source: str) -> dict[str, Table]:
    if column not in table.column_names:
        hint = did_you_mean(column, table.column_names)
        raise DataError(f"{source}: has no column {column!r}{hint}; mend data.split_column")
    return split_by_column(table, column)


def with_constant(table: Table, column: str, value: str) -> Table:
    """The table with a column that holds one value."""
    constant = pa.repeat(pa.scalar(value, pa.string()), len(table))
    kept = table.remove_columns(column) if column in table.column_names else table
    return kept.add_column(column, constant)


def join_tables(tables: Sequence[Table]) -> Table:
    """The rows of several tables, one after another."""
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(list(tables))


def load_named(source: str, name: str | None, subject: str, **options: Any) -> dict[str, Table]:
    """`datasets.load_dataset` with its many errors as one.

    Raises:
        DataError: nothing of that name, or data that cannot be read, with the reason.
    """
    try:
        loaded = datasets.load_dataset(source, name, **options)
    except ConnectionError as error:
        raise DataError(
            f"{subject}: is no file or folder here, and the hub could not be asked for it"
            f" ({_reason(error)}); check the name, or give a local copy"
        ) from error
    except (OSError, ValueError, TypeError, DatasetsError, StopIteration) as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise DataError(f"{subject}: is empty; expected at least one row") from error
        raise DataError(f"{subject}: cannot be loaded ({_reason(error)})") from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise ConfigError(f"{subject}: give the split by `splits`, not by options.split")
    return dict(loaded)


def load_file(file: str) -> Table:
    """The rows of one local file of any known ending.

    Raises:
        DataError: it is not there, or of no known ending.
    """
    builder, options = _builder_of(Path(file))
    if builder is None:
        raise DataError(_complain_about_ending(file))
    return _load_files(builder, file, options)["train"]


def _load(config: DataConfig, name: str | None) -> dict[str, Table]:
    source, files = config.source, config.files
    path = Path(source).expanduser()
    if source in _BUILDERS:
        if files is None:
            raise ConfigError(f"source {source}: needs `files`; name the files it reads")
        return _load_files(source, files, config.options)
    if path.is_dir():
        return _load_folder(path, name, config)
    builder, options = _builder_of(path)
    if builder:
        return _load_files(builder, str(path), {**options, **config.options})
    if path.is_file():
        raise DataError(_complain_about_ending(source))
    arguments = config.options if files is None else {**config.options, "data_files": files}
    return load_named(source, name, source, **arguments)


def _load_folder(path: Path, name: str | None, config: DataConfig) -> dict[str, Table]:
    if (path / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(path)))
    if (path / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(path))}
    options = config.options
    if config.files is not None:
        options = {**options, "data_files": config.files}
    return load_named(str(path), name, str(path), **options)


def _load_files(
    builder: str, files: str | list[str] | dict[str, str | list[str]], options: dict[str, Any]
) -> dict[str, Table]:
    groups = files if isinstance(files, dict) else {"train": files}
    data_files = {
        split: [_check_file(f) for f in _listed(group)] for split, group in groups.items()
    }
    subject = ", ".join(file for group in data_files.values() for file in group)
    return load_named(builder, None, subject, data_files=data_files, **options)


def _check_file(file: str) -> str:
    if "://" in file:
        return file
    path = Path(os.path.expandvars(file)).expanduser()
    if str(path).startswith("$"):
        raise DataError(f"{file}: the environment variable {path.parts[0]} is not set; set it")
    anchor = Path(path.anchor)
    if path.is_file() or any(anchor.glob(str(path.relative_to(anchor)))):
        return str(path)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings[:100]) if siblings else "; its folder is missing too"
    raise DataError(f"{file}: no such file{hint}")


def _builder_of(path: Path) -> tuple[str | None, dict[str, Any]]:
    name = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return _ENDINGS.get(name.suffix.lower(), (None, {}))


def _complain_about_ending(file: str) -> str:
    endings = ", ".join(_ENDINGS)
    return (
        f"{file}: no builder is known for this ending, expected {endings}; give the builder"
        " as `source` and the file as `files`"
    )


def _pick(tables: Mapping[str, Table], spec: str, source: str) -> Table:
    for part in spec.split("+"):
        name = part.split("[")[0].strip()
        if name not in tables:
            there = ", ".join(tables) or "none"
            raise DataError(f"{source}: has no split {name!r}, only {there}; mend `splits`")
    if spec in tables:
        return tables[spec]
    try:
        instruction = datasets.ReadInstruction.from_spec(spec)
        ranges = instruction.to_absolute({name: len(table) for name, table in tables.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{source}: split {spec!r} is no slice ({_reason(error)})") from error
    return join_tables([_cut(tables[r.splitname], r.from_, r.to) for r in ranges])


def _cut(table: Table, start: int | None, stop: int | None) -> Table:
    first = 0 if start is None else start
    return table.select(range(first, len(table) if stop is None else max(stop, first)))


def _listed(files: str | list[str]) -> Iterable[str]:
    return [files] if isinstance(files, str) else files


def _reason(error: BaseException) -> str:
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return " ".join(str(root).split()) or type(root).__name__


def find_folder(config: DataConfig, child: str, pattern: str) -> Path:
    """The folder of a source of our own: `files`, or a folder of the one STILLROOM_DATA names.

    Args:
        child: its name there.
        pattern: of its files.

    Raises:
        ConfigError: `files` is not one folder.
        DataError: the folder is not there, or holds no such file.
    """
    if config.files is not None and not isinstance(config.files, str):
        raise ConfigError(f"source {config.source}: `files` is the folder that holds {pattern}")
    given = os.environ.get(FOLDER_VARIABLE)
    folder = Path(given) / child if given else None
    if config.files is not None:
        folder = Path(config.files).expanduser()
    if folder is None or not any(folder.glob(pattern)):
        subject = f"source {config.source}: has no folder"
        where = f"{folder}: holds no {pattern}" if folder else subject
        raise DataError(f"{where}; give it by `files`, or its parent by {FOLDER_VARIABLE}")
    return folder
