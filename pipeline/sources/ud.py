"""Universal Dependencies: words and their universal parts of speech, one treebank per file.

de Marneffe et al. 2021. Read from a local folder (`files`, or ud_upos in the folder that the
environment variable STILLROOM_DATA names) of files <treebank>.<part>.jsonl.gz with id, tokens and
upos; pud.<language>.jsonl.gz is the test part of <language>_pud. An id is
`<treebank>.<part>/<sentence>`.
"""

from pathlib import Path

import datasets

from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.sources.config import DataConfig
from pipeline.sources.opening import (
    Opened,
    Table,
    find_folder,
    join_tables,
    load_named,
    pick_splits,
    with_constant,
)

# fmt: off
UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM",
    "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X",
)
# fmt: on
_ENDING = ".jsonl.gz"


def open_ud(config: DataConfig) -> Opened:
    """The chosen treebanks (`name`), one after another: id, tokens, tags, language, treebank.

    Splits are the parts that every chosen treebank has: train, dev, test.

    Raises:
        ConfigError: no treebank is named, or `files` is not one folder.
        DataError: the folder or a treebank is not there.
    """
    treebanks = [name for name in config.names if name is not None]
    if not treebanks:
        raise ConfigError("source ud: name the treebanks by `name`, for instance en_ewt")
    there = _list_files(find_folder(config, "ud_upos", f"*{_ENDING}"))
    for treebank in treebanks:
        if treebank not in there:
            hint = did_you_mean(treebank, there)
            raise DataError(f"source ud: has no treebank {treebank!r}{hint}")
    loaded = [{p: _load(f, t, p) for p, f in there[t].items()} for t in treebanks]
    common = [part for part in loaded[0] if all(part in one for one in loaded)]
    tables = {part: join_tables([one[part] for one in loaded]) for part in common}
    columns = {"tags": "upos", "language": "language", "treebank": "treebank"}
    return Opened(pick_splits(tables, config), columns)


def _list_files(folder: Path) -> dict[str, dict[str, Path]]:
    """treebank -> part -> file."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob(f"*{_ENDING}")):
        first, _, last = file.name.removesuffix(_ENDING).partition(".")
        treebank, part = (f"{last}_pud", "test") if first == "pud" else (first, last)
        found.setdefault(treebank, {})[part] = file
    return found


def _load(file: Path, treebank: str, part: str) -> Table:
    table = load_named("json", None, str(file), data_files=[str(file)])["train"]
    ids = [f"{treebank}.{part}/{name}" for name in table["id"]]
    tags = datasets.List(datasets.ClassLabel(names=list(UPOS)))
    table = table.remove_columns("id").add_column("id", ids).cast_column("upos", tags)
    table = with_constant(table, "language", treebank.partition("_")[0])
    return with_constant(table, "treebank", treebank)
