"""Views as strangers may have made them, over caches that are sound or changed too.

    write_view_base -> view/, and the caches cache/, more/, hot/ -- mutate --> reseal_view

The view takes rows of one cache in two parts; another cache says more signals of them, a third one
more temperatures.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cache_examples import make_draft, make_example, write_cache
from fuzz_mutations import reseal, write_base

from pipeline.cache import (
    Overlay,
    RowRuns,
    Signal,
    TargetsSpec,
    TeacherCache,
    read_manifest,
    select_rows,
    write_view,
)
from pipeline.cache.documents import SEAL, write_sealed
from pipeline.errors import StillroomError

VIEW = "view"
CACHES = ("cache", "more", "hot")
_TAKEN = ([0, 2, 3], [1, 5])


def write_view_base(path: Path) -> None:
    """A view, and the caches that it is of, in folders of one folder."""
    write_base(path / "cache")
    signals = {"layer.3": Signal(width=5, dtype="float16")}
    _write_over(path / "more", TargetsSpec(top_k=1, codec="lossless"), signals)
    warm = TargetsSpec(top_k=4, tail_draws=2, temperatures=(1.0, 2.0, 4.0), codec="steps")
    _write_over(path / "hot", warm, {})
    cache, more, hot = (TeacherCache.open(path / name) for name in CACHES)
    parts = []
    for numbers in _TAKEN:
        rows = RowRuns.of(np.array(numbers))
        (part,) = select_rows(cache, rows)
        over = (Overlay(more, rows), Overlay(hot, rows, targets=True))
        parts.append(replace(part, overlays=over))
    write_view(path / VIEW, parts)


def _write_over(path: Path, targets: TargetsSpec, signals: dict[str, Signal]) -> None:
    draft = make_draft(6, targets=targets, signals=signals, num_classes=300, columns={})
    examples = [replace(make_example(row, draft), columns={}) for row in range(6)]
    write_cache(path, draft, examples)


def reseal_view(path: Path) -> None:
    """Mend every checksum, digest and name of a view and its caches."""
    digests = {}
    for name in CACHES:
        reseal(path / name)
        try:
            digests[f"../{name}"] = read_manifest(path / name).digest
        except StillroomError:
            continue
    renamed = {}
    for file in sorted((path / VIEW / "rows").iterdir()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        renamed[file.stem] = digest
        file.with_name(f"{digest}.arrow").write_bytes(file.read_bytes())
    file = path / VIEW / "view.json"
    try:
        raw = json.loads(file.read_bytes())
        for part in raw["parts"]:
            for source in (part, *part.get("overlays", [])):
                source["digest"] = digests.get(source["path"], source["digest"])
                if "rows" in source:
                    source["rows"] = renamed.get(source["rows"], source["rows"])
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass  # sealed as far as it still is a view
    seal_view(file)


def seal_view(file: Path) -> None:
    """Mend the checksum of a view.json; what is no document stays as it is."""
    try:
        raw: Any = json.loads(file.read_bytes())
        raw.pop(SEAL, None)
        write_sealed(file, raw)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
