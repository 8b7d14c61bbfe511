"""What a student learns from, by content: it goes on with the same, and is measured on the same.

reading (+ further caches) -> describe_lineage -> digests by name: identity.json, result.json
a run, what it was given -> require_same_lineage
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.cache import TeacherCache
from pipeline.config import canonical_json
from pipeline.errors import MismatchError
from pipeline.identity import ExamplesDigest, digest_json, digest_tokenizer
from pipeline.reading import Reading
from pipeline.runs import read_result
from pipeline.teachers import FurtherTeachers

IDENTITY = "identity.json"  # of a run under way; a finished one has it in result.json


def describe_cache(cache: TeacherCache) -> dict[str, str]:
    """A cache and what it was made from.

    Returns:
        `cache`, the manifest's digest, and one for each part that decides it, to name the part in
        which two caches differ.
    """
    manifest = cache.manifest
    parts = {name: str(part["digest"]) for name, part in manifest.identity}
    parts |= {
        name: digest_json(json.loads(canonical_json(value)))
        for name, value in manifest.model_dump(
            mode="json", include={"task", "targets", "signals", "positions", "label_names"}
        ).items()
    }
    return {"cache": manifest.digest, **{f"cache.{name}": part for name, part in parts.items()}}


def describe_lineage(reading: Reading, further: FurtherTeachers | None = None) -> dict[str, str]:
    """All that a student reads: its cache, texts of its own, its tokenizer, further teachers."""
    found = {**describe_cache(reading.cache), "tokenizer": digest_tokenizer(reading.tokenizer)}
    if reading.own_rows is not None:
        digest = ExamplesDigest()
        for example in reading.own_rows:
            digest.add(example)
        found["inputs"] = digest.hexdigest()
    for name, cache in (further.open() if further else {}).items():
        found[f"further_teachers.{name}"] = cache.manifest.digest
    return found


def read_lineage(run: Path) -> Mapping[str, str]:
    """What a run, finished or under way, has learned from, as far as it tells."""
    if (run / "result.json").is_file():
        return read_result(run).identity
    if (run / IDENTITY).is_file():
        found: dict[str, str] = json.loads((run / IDENTITY).read_text(encoding="utf-8"))
        return found
    return {}


def require_same_lineage(run: Path, found: Mapping[str, str]) -> None:
    """Compare with what a run, finished or under way, has learned from; what one of both does not
    tell is passed over.

    Raises:
        MismatchError: names what differs.
    """
    known = read_lineage(run)
    names = [name for name in known if name in found and known[name] != found[name]]
    if not names:
        return
    # A cache differs where a part of it does; the part says more.
    names.sort(key=lambda name: name.endswith("cache"))
    shown = [f"{name} {known[name][:8]}…, found {found[name][:8]}…" for name in names[:4]]
    raise MismatchError(
        f"{run}: learned from {'; '.join(shown)}; give it what it was trained on, or train into"
        " another output"
    )
