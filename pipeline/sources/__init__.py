"""Where texts come from: any data set becomes an iterable of rows with the same column names.

    DataConfig -> opening -> tables by split -> columns -> filters -> labels -> Rows

Canonical columns: id, text, text_pair, score, label, messages, prompt, completion, source and
target, tokens and tags, question, context and answers, and those that are mapped or carried. Tables
stay on disk, Arrow-backed; a row becomes Python only when it is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from typing import Any

import datasets
import numpy as np

from pipeline.config import canonical_json
from pipeline.errors import DataError
from pipeline.sources import parallel
from pipeline.sources.augmenting import Augmentation, augment, list_words
from pipeline.sources.config import DataConfig, Labelled
from pipeline.sources.labels import LabelSet, collect_labels, complain_about
from pipeline.sources.opening import Opened, open_dataset, pick_splits, split_by_column
from pipeline.sources.part import Part, cut_part, resolve_columns
from pipeline.sources.sib200 import open_sib200
from pipeline.sources.stdlib import stdlib_rows
from pipeline.sources.ud import open_ud
from pipeline.sources.xquad import open_xquad

__all__ = ["Augmentation", "DataConfig", "Labelled", "Rows", "load_rows"]


@dataclass(frozen=True)
class Rows:
    """A data set as `{id, split, text..., label, carried...}`, split after split, in source order.

    `label` is a class number, None where a row has no label or does not keep it; `tags` is a list
    of such, one for each of the row's `tokens`. `answers` are as in SQuAD, text and answer_start,
    and None where a row does not keep them.

    Attributes:
        parts: the kept rows of each split.
        labels: the label set, None for data without a column of labels or tags.
        keeps_label: [n] bool for the train rows, None where all keep their label.
        augmentation: of the training texts, None for none.
        description: source, configurations, splits and counts; JSON values only.
    """

    parts: tuple[Part, ...]
    labels: LabelSet | None
    keeps_label: np.ndarray | None
    augmentation: Augmentation | None
    description: Mapping[str, Any]

    @property
    def label_names(self) -> list[str] | None:
        """The classes in order."""
        return self.labels.names if self.labels else None

    def __len__(self) -> int:
        copies = self.augmentation.copies if self.augmentation else 0
        times = {"train": 1 + copies}
        return sum(len(part) * times.get(part.split, 1) for part in self.parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.augmentation is None:
            return self._read()
        return augment(self._read(), self.augmentation, self._words)

    @cached_property
    def _words(self) -> np.ndarray:
        return list_words(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            masked = self.keeps_label if part.split == "train" else None
            column = part.class_column or "answers"
            for number, row in enumerate(part.rows()):
                if masked is not None and not masked[number]:
                    row[column] = None
                elif self.labels is not None:
                    row[column] = self.labels.encode(row[column])
                yield row

    @cached_property
    def digest(self) -> str:
        """Digest of every row's content, in order, and of the label names; it reads all rows."""
        content = blake2b(canonical_json(self.label_names).encode(), digest_size=16)
        for row in self:
            content.update(canonical_json(row).encode())
            content.update(b"\n")
        return content.hexdigest()


def load_rows(config: DataConfig, unique: bool = True) -> Rows:
    """Open a data set and check all that can be checked without reading its texts.

    Args:
        config: what to load.
        unique: whether an id may stand only once; a student's inputs may repeat ids.

    Raises:
        ConfigError: a builder without files.
        DataError: a file, configuration, split or column that is not there, no rows, a label
            outside the label set, an id that stands twice.
    """
    opened = _open(config)
    columns = resolve_columns(config, opened)
    if not columns.keys() & {"text", "messages", "prompt", "source", "tokens", "question"}:
        found = ", ".join(sorted(next(iter(opened.tables.values())).column_names))
        raise DataError(
            f"{config.source}: has the columns {found}; expected text, messages, prompt and"
            " completion, source and target, tokens, or question and context: map them with"
            " data.columns, for instance columns.text=NAME"
        )
    parts = tuple(cut_part(split, opened, config, columns) for split in config.splits)
    if unique:
        _check_unique(parts, config.source)
    labels = _read_labels(parts, config.label_names) if parts[0].class_column else None
    train = next((part for part in parts if part.split == "train"), None)
    keeps = None
    known = labels is not None or "answers" in columns
    if config.labelled is not None and train is not None and known:
        keeps = _choose_labelled(train, config.labelled)
    return Rows(parts, labels, keeps, config.augment, _describe(config, parts, keeps))


def _open(config: DataConfig) -> Opened:
    if config.source == "stdlib":
        table = datasets.Dataset.from_list(list(stdlib_rows()))
        return Opened(pick_splits(split_by_column(table, "split"), config))
    if config.source == "sib200":
        return open_sib200(config)
    if config.source == "ud":
        return open_ud(config)
    if config.source == "xquad":
        return open_xquad(config)
    if config.source in parallel.SOURCES:
        return parallel.open_parallel(config)
    return open_dataset(config)


def _check_unique(parts: tuple[Part, ...], source: str) -> None:
    if all("id" not in part.columns for part in parts):
        return  # numbered by us
    keys = _hash_ids(chain.from_iterable(part.ids() for part in parts), seed=0)
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice) == 0:
        return
    first = int(np.flatnonzero(keys == twice[0])[0])
    name = next(n for i, n in enumerate(chain.from_iterable(p.ids() for p in parts)) if i == first)
    raise DataError(
        f"{source}: id {name!r} stands on more than one row ({len(twice)} repeated); a teacher's"
        " data needs one row per id, so choose one configuration or another id column"
    )


def _read_labels(parts: tuple[Part, ...], names: list[str] | None) -> LabelSet:
    features = [part.class_feature for part in parts]
    every = chain.from_iterable(keys for part in parts for keys in part.labels())
    labels = collect_labels(features, every, names)
    for part in parts:
        for row_id, keys in zip(part.ids(), part.labels(), strict=True):
            for key in keys:
                if key is not None and key not in labels.codes:
                    raise complain_about(key, row_id, part.subject, labels.names)
    return labels


def _choose_labelled(train: Part, labelled: Labelled) -> np.ndarray:
    """[n] bool; the ids with the smallest keyed hash, so that no order of rows matters."""
    eligible: np.ndarray = train.matching(labelled.where) & train.has_labels()
    if labelled.count is None:
        return eligible
    keys = _hash_ids(train.ids(), labelled.seed)
    candidates = np.unique(keys[eligible])
    if labelled.count > len(candidates):
        raise DataError(
            f"{train.subject}: labelled.count is {labelled.count}, but only {len(candidates)} ids"
            " have a label that may be kept; lower it, or leave it out to keep all"
        )
    chosen = candidates[: labelled.count]
    kept: np.ndarray = eligible & np.isin(keys, chosen)
    return kept


def _hash_ids(ids: Iterator[str], seed: int) -> np.ndarray:
    """[n] uint64, one well-mixed number per id that no process or machine changes."""
    key = str(seed).encode()
    hashes = (blake2b(name.encode(), digest_size=8, key=key).digest() for name in ids)
    numbers: np.ndarray = np.frombuffer(b"".join(hashes), dtype=">u8").astype(np.uint64)
    return numbers


def _describe(
    config: DataConfig, parts: tuple[Part, ...], keeps: np.ndarray | None
) -> dict[str, Any]:
    chosen = config.model_dump(mode="json", exclude_defaults=True, exclude={"files", "licence"})
    counts: dict[str, int] = {part.split: len(part) for part in parts}
    described = {"source": config.source, **chosen, "counts": counts}
    return described if keeps is None else {**described, "labelled_rows": int(keeps.sum())}
