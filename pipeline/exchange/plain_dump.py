"""Our own plain columns, read back: the same records but for the rounding of one addition."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from pydantic import BaseModel, Field, JsonValue

from pipeline.cache import Imported, TargetsSpec
from pipeline.config import parse_config
from pipeline.errors import ConfigError, DataError
from pipeline.exchange.containers import Row, matrix, numbers
from pipeline.exchange.dump import Draws, Dump, Facts, Record, take
from pipeline.exchange.plain import name_carried
from pipeline.exchange.writing import METADATA, VERSION, facts_file


class _PlainFacts(BaseModel):
    """What a file says of the cache that it was exported from; a stranger may have written it."""

    plain_version: int
    cache: str
    identity: dict[str, JsonValue]
    task: dict[str, JsonValue]
    targets: TargetsSpec
    num_classes: int = Field(gt=0)
    shifted: bool
    label_names: list[str] | None
    columns: dict[str, str]
    imported: Imported | None = None
    skipped: dict[str, str] = {}


class PlainDump(Dump):
    """What `stillroom export` wrote of a cache, hidden states left out; data/README.md."""

    open_questions: ClassVar = ()

    name: Literal["stillroom"] = "stillroom"
    id_field: str | None = "example_id"

    def facts(self, files: Sequence[Path]) -> Facts:
        """See `Dump.facts`; the files' own, which must agree."""
        first, *others = [_read_facts(file) for file in files]
        for file, other in zip(files[1:], others, strict=True):
            for name in ("num_classes", "targets", "task", "shifted", "label_names", "columns"):
                if getattr(first, name) != getattr(other, name):
                    raise DataError(
                        f"{file}: its {name} differ from those of {files[0]}; import them apart"
                    )
        return Facts(
            temperatures=first.targets.temperatures,
            tail_draws=first.targets.tail_draws,
            task=first.task,
            shifted=first.shifted,
            label_names=first.label_names,
            num_classes=first.num_classes,
            columns={name: name_carried(name) for name in first.columns},
            skipped={i: why for file in (first, *others) for i, why in file.skipped.items()},
            origin=first.model_dump(
                mode="json", include={"cache", "identity", "imported"}, exclude_none=True
            ),
        )

    def records(self, row: Row, tokenizer: Any) -> Iterator[Record]:
        """See `Dump.records`."""
        logsumexp = matrix(take(row, "logsumexp"), np.float32)
        count = len(logsumexp.lengths)
        draws = {
            name: _rectangle(matrix(row.get(f"draw_{name}") or [], kind), count)
            for name, kind in (("ids", np.int64), ("log_probs", np.float32))
        }
        yield Record(
            example_id=None,
            input_ids=numbers(take(row, "input_ids"), np.int64),
            segment_lengths=numbers(take(row, "segment_lengths"), np.int64),
            positions=numbers(take(row, "target_positions"), np.int64),
            label_ids=numbers(take(row, "label_ids"), np.int64),
            ids=matrix(take(row, "ids"), np.int64),
            log_probs=matrix(take(row, "log_probs"), np.float32),
            label_log_probs=numbers(take(row, "label_log_probs"), np.float32),
            draws=Draws(_rectangle(logsumexp, count), **draws),
        )


def _rectangle(lists: Any, count: int) -> np.ndarray:
    """[count, w], of lists of one length."""
    if len(set(lists.lengths.tolist())) > 1:
        raise ValueError("lists of one length each are expected in logsumexp and the draws")
    found: np.ndarray = lists.values.reshape(count, int(lists.lengths[:1].sum()))
    return found


def _read_facts(file: Path) -> _PlainFacts:
    try:
        if file.suffix == ".parquet":
            with file.open("rb") as source:
                text = (parquet.read_schema(source).metadata or {})[METADATA]
        else:
            text = facts_file(file).read_bytes()
        facts = json.loads(text)
        version = facts.get("plain_version")
    except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: does not say what cache it was exported from; give a file of `stillroom"
            " export`, lines of JSON with the .manifest.json beside them"
        ) from error
    if version != VERSION:
        raise DataError(
            f"{file}: plain columns {version!r}, this Stillroom reads {VERSION}; update Stillroom,"
            " or export the cache again with this one"
        )
    try:
        return parse_config(_PlainFacts, facts, "what it says of its cache")
    except ConfigError as error:
        raise DataError(f"{file}: {error}; export the cache again") from error
