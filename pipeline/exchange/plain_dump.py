"""Our own plain columns, read back: the same records but for the rounding of one addition."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from pipeline.errors import DataError
from pipeline.exchange.containers import Row, matrix, numbers
from pipeline.exchange.dump import Draws, Dump, Facts, Record, take
from pipeline.exchange.plain import name_carried
from pipeline.exchange.writing import METADATA, VERSION, facts_file


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
                if first.get(name) != other.get(name):
                    raise DataError(
                        f"{file}: its {name} differ from those of {files[0]}; import them apart"
                    )
        kept = first["targets"]
        return Facts(
            temperatures=tuple(kept["temperatures"]),
            tail_draws=kept["tail_draws"],
            task=first["task"],
            shifted=first["shifted"],
            label_names=first["label_names"],
            num_classes=first["num_classes"],
            columns={name: name_carried(name) for name in first["columns"]},
            origin={k: first[k] for k in ("cache", "identity", "imported") if first.get(k)},
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


def _read_facts(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".parquet":
            with file.open("rb") as source:
                text = (parquet.read_schema(source).metadata or {})[METADATA]
        else:
            text = facts_file(file).read_bytes()
        facts: dict[str, Any] = json.loads(text)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: does not say what cache it was exported from; give a file of `stillroom"
            " export`, lines of JSON with the .manifest.json beside them"
        ) from error
    if facts.get("plain_version") != VERSION:
        raise DataError(
            f"{file}: plain columns {facts.get('plain_version')}, this Stillroom reads {VERSION};"
            " export the cache again"
        )
    return facts
