"""Parallel text: sentences of one language beside their translations.

    pairs -> distinct source texts, in the source's language -> a teacher's rows
          -> translations, each with the id of its source   -> a student's rows

A file has a row per pair: `lang`, `text` (the translation) and the source text in a column named
after its language (`eng`; another one by `options.pivot`). An id is a source text: it stands once
in the source's language, and once for each of its translations. Where there is no column `split`,
ids are dealt to train, validation and test by a hash, 8 : 1 : 1. Tatoeba (Artetxe & Schwenk 2019)
and FLORES v1 (Guzmán et al. 2019) are found in the folder STILLROOM_DATA.
"""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import datasets

from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.sources.config import DataConfig
from pipeline.sources.opening import (
    FOLDER_VARIABLE,
    Opened,
    Table,
    load_file,
    pick_splits,
    split_by_column,
)

NAMED = {  # file, and language of the source texts
    "tatoeba": ("tatoeba/tatoeba_eng.jsonl.gz", "eng"),
    "flores": ("flores_v1/flores_v1.jsonl.gz", "en"),
}
SOURCES = ("parallel", *NAMED)
_SHARES = (("train", 80), ("validation", 90), ("test", 100))  # upper bounds in percent


def open_parallel(config: DataConfig) -> Opened:
    """The chosen languages, one after another, with columns id, text, language.

    `name` chooses languages, the source's among them; None is all, the source's first.

    Raises:
        ConfigError: no file is named.
        DataError: the file, a column or a language is not there.
    """
    file = _find_file(config)
    pivot = str(config.options.get("pivot", NAMED.get(config.source, ("", "eng"))[1]))
    pairs = load_file(file)
    for column in ("text", "lang", pivot):
        if column not in pairs.column_names:
            raise DataError(
                f"{file}: has no column {column!r}{did_you_mean(column, pairs.column_names)};"
                " expected lang, text and the source's, which options.pivot names"
            )
    there = [pivot, *dict.fromkeys(pairs["lang"])]
    wanted = [name for name in config.names if name is not None] or there
    for language in wanted:
        if language not in there:
            raise DataError(f"{file}: has no language {language!r}{did_you_mean(language, there)}")
    table = _join(pairs, pivot, wanted)
    tables = pick_splits(split_by_column(table, "split"), config)
    return Opened(tables, {"language": "language"})


def _join(pairs: Table, pivot: str, languages: Sequence[str]) -> Table:
    """Rows by language, in the order of `languages`."""
    sources: list[str] = pairs[pivot][:]
    ids = {text: blake2b(text.encode(), digest_size=8).hexdigest() for text in sources}
    splits = {text: _deal(identity) for text, identity in ids.items()}
    if "split" in pairs.column_names:  # one that stands in several belongs to the last of them
        splits = dict(zip(sources, pairs["split"], strict=True))
    rows: dict[str, list[tuple[str, str]]] = {language: [] for language in languages}
    if pivot in rows:
        rows[pivot] = [(text, text) for text in ids]
    for language, text, source in zip(pairs["lang"], pairs["text"], sources, strict=True):
        if language in rows and language != pivot:
            rows[language].append((text, source))
    found = [(language, *row) for language in languages for row in rows[language]]
    return datasets.Dataset.from_dict(
        {
            "id": [ids[source] for _, _, source in found],
            "split": [splits[source] for _, _, source in found],
            "language": [language for language, _, _ in found],
            "text": [text for _, text, _ in found],
        }
    )


def _deal(identity: str) -> str:
    percent = int(identity, 16) % 100
    return next(name for name, bound in _SHARES if percent < bound)


def _find_file(config: DataConfig) -> str:
    if config.files is not None:
        if not isinstance(config.files, str):
            raise ConfigError(f"source {config.source}: `files` is the one file of pairs")
        return config.files
    if config.source not in NAMED:
        raise ConfigError(f"source {config.source}: needs `files`; name the file of pairs")
    folder, inside = os.environ.get(FOLDER_VARIABLE), NAMED[config.source][0]
    if not folder:
        raise ConfigError(
            f"source {config.source}: give its file by `files`, or in the environment variable"
            f" {FOLDER_VARIABLE} the folder that holds {inside}"
        )
    return str(Path(folder).expanduser() / inside)
