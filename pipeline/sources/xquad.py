"""XQuAD: 1,190 questions on 240 paragraphs of 48 articles, in the same words of twelve languages.

Artetxe et al. 2020. Read from a local folder (`files`, or xquad in the folder that the environment
variable STILLROOM_DATA names) of files xquad.<language>.jsonl.gz: paragraphs (type context, ctx,
context), then questions (type qa, id, ctx, title, question, answer, start). It has no splits of its
own, so articles are dealt to three, the same in every language. An id is `<language>/<question>`.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets

from pipeline.errors import DataError, did_you_mean
from pipeline.sources.config import DataConfig
from pipeline.sources.opening import Opened, find_folder, pick_splits, split_by_column

# The split of an article by its number modulo 8: 30 train, 6 validation, 12 test.
_DEALT = ("train", "train", "train", "train", "train", "validation", "test", "test")
_NAME = "xquad.{}.jsonl.gz"


def open_xquad(config: DataConfig) -> Opened:
    """The chosen languages (`name`, all by default): id, question, context, answers, language and
    title.

    Raises:
        ConfigError: `files` is not one folder.
        DataError: the folder or a language is not there.
    """
    folder = find_folder(config, "xquad", _NAME.format("*"))
    there = [path.name.split(".")[1] for path in sorted(folder.glob(_NAME.format("*")))]
    languages = [name for name in config.names if name is not None] or there
    rows: list[dict[str, Any]] = []
    for language in languages:
        if language not in there:
            raise DataError(
                f"{folder}: has no language {language!r}{did_you_mean(language, there)}"
            )
        rows += _read(folder / _NAME.format(language), language)
    tables = split_by_column(datasets.Dataset.from_list(rows), "split")
    return Opened(pick_splits(tables, config), {"language": "language", "title": "title"})


def _read(file: Path, language: str) -> list[dict[str, Any]]:
    rows, contexts = list[dict[str, Any]](), dict[str, str]()
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["type"] == "context":
                contexts[line["ctx"]] = line["context"]
                continue
            article = int(line["ctx"].split("-")[0])
            rows.append(
                {
                    "id": f"{language}/{line['id']}",
                    "split": _DEALT[article % len(_DEALT)],
                    "question": line["question"],
                    "context": contexts[line["ctx"]],
                    "answers": {"text": [line["answer"]], "answer_start": [line["start"]]},
                    "language": language,
                    "title": line["title"],
                }
            )
    return rows
