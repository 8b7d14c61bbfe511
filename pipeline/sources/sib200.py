"""SIB-200: one topic per sentence, the same 1,004 sentences in every language.

Adelani et al. 2024. Read from a local folder (`files`, or the environment variable
STILLROOM_SIB200) that holds sib200_core24.jsonl.gz, otherwise from the hub. An id is a sentence: it
stands once per language, so several languages can only be read as inputs of students.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.sources.config import DataConfig
from pipeline.sources.opening import (
    Opened,
    Table,
    join_tables,
    load_named,
    pick_splits,
    split_by_column,
    with_constant,
)

FOLDER_VARIABLE = "STILLROOM_SIB200"
HUB_NAME = "Davlan/sib200"
# fmt: off
LANGUAGES = (
    "eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn", "por_Latn", "rus_Cyrl",
    "zho_Hans", "arb_Arab", "hin_Deva", "tur_Latn", "ind_Latn", "vie_Latn",
    "swh_Latn", "yor_Latn", "hau_Latn", "ibo_Latn", "amh_Ethi", "zul_Latn",
    "wol_Latn", "npi_Deva", "mlt_Latn", "gle_Latn", "tat_Cyrl", "quy_Latn",
)
# fmt: on
_LOCAL_FILE = "sib200_core24.jsonl.gz"


def open_sib200(config: DataConfig) -> Opened:
    """The chosen languages, one after another, with columns id, text, label, language.

    Splits are train, validation (also by its file name, dev) and test.

    Raises:
        ConfigError: `files` is not one folder.
        DataError: the folder or a language is not there, or the hub cannot be reached.
    """
    languages = [name for name in config.names if name is not None] or list(LANGUAGES)
    folder = _find_folder(config)
    if folder is None:
        return open_hub(HUB_NAME, languages, config)
    return _open_folder(folder, languages, config)


def open_hub(repository: str, languages: Sequence[str], config: DataConfig) -> Opened:
    """The languages as configurations of a data set with columns index_id, category, text."""
    parts: dict[str, list[Table]] = {}
    for language in languages:
        for split, table in load_named(repository, language, repository).items():
            parts.setdefault(split, []).append(with_constant(table, "language", language))
    tables = {split: join_tables(group) for split, group in parts.items()}
    columns = {"id": "index_id", "label": "category", "language": "language"}
    return Opened(pick_splits(_with_dev(tables), config), columns)


def _open_folder(folder: Path, languages: Sequence[str], config: DataConfig) -> Opened:
    file = str(folder / _LOCAL_FILE)
    table = load_named("json", None, file, data_files=[file])["train"]
    column = np.asarray(table["lang"])
    there = list(dict.fromkeys(column.tolist()))
    for language in languages:
        if language not in there:
            raise DataError(f"{file}: has no language {language!r}{did_you_mean(language, there)}")
    wanted = [np.flatnonzero(column == language) for language in languages]
    chosen = split_by_column(table.select(np.concatenate(wanted)), "split")
    return Opened(pick_splits(_with_dev(chosen), config), {"language": "lang"})


def _find_folder(config: DataConfig) -> Path | None:
    if config.files is not None and not isinstance(config.files, str):
        raise ConfigError("source sib200: `files` is the folder that holds " + _LOCAL_FILE)
    given = config.files or os.environ.get(FOLDER_VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not (folder / _LOCAL_FILE).is_file():
        raise DataError(
            f"{folder}: holds no {_LOCAL_FILE}; give its folder by `files` or {FOLDER_VARIABLE}, or"
            " neither to read the hub"
        )
    return folder


def _with_dev(tables: dict[str, Table]) -> dict[str, Table]:
    """Either name of the held-out split names it."""
    for name, other in (("validation", "dev"), ("dev", "validation")):
        if other in tables and name not in tables:
            return {**tables, name: tables[other]}
    return tables
