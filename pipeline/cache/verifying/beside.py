"""What stands beside the shards of a finished cache, byte by byte."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.cache import output_head
from pipeline.cache.checksums import find_difference
from pipeline.cache.documents import read_json
from pipeline.cache.index.splits import SHARDS
from pipeline.cache.manifest import DRAFT, Files, Manifest
from pipeline.cache.signals.projection import FILE as PROJECTIONS_FILE
from pipeline.cache.verifying.findings import Finding
from pipeline.errors import CacheError
from pipeline.storage import hash_file, list_files

CAPTURE, CONFIG, SETTINGS = "capture.json", "config.yaml", "teacher.json"
_LEFT_OVER = (DRAFT, "examples.arrow", "generated.jsonl")  # of a capture, once it is finished


def check_beside(path: Path, manifest: Manifest) -> Iterator[Finding]:
    """Index, tokenizer, projections, head, capture.json and config.yaml, and what was left over.
    Other files beside them (a README of a hub's repository) are their owner's."""
    yield from _compare(path, manifest.files)
    digests = {
        SHARDS: manifest.shards,
        PROJECTIONS_FILE: manifest.projections,
        output_head.FILE: manifest.head,
    }
    for name, digest in digests.items():  # which caches without `files` have too
        if name not in manifest.files and digest is not None:
            yield from _compare_digest(path, name, digest)
    yield from _check_capture(path, sealed=bool(manifest.files))
    for name in _LEFT_OVER:
        if (path / name).is_file():
            yield Finding("orphan", name, "was left behind by a capture")
    if manifest.files:
        for folder in ("index", "tokenizer"):
            names = {f"{folder}/{name}" for name in list_files(path / folder)}
            for name in sorted(names - manifest.files.keys()):
                yield Finding("orphan", name, "belongs to nothing")


def _check_capture(path: Path, sealed: bool) -> Iterator[Finding]:
    if not (path / CAPTURE).is_file():
        return
    try:
        files = read_json(path / CAPTURE, require_seal=sealed).get("files", {})
    except CacheError as error:
        yield Finding("damage", CAPTURE, str(error).removeprefix(f"{path / CAPTURE}: "))
        return
    yield from _compare(path, {name: (int(size), digest) for name, (size, digest) in files.items()})


def _compare(path: Path, listed: Files) -> Iterator[Finding]:
    for name in listed:
        difference = find_difference(path, name, listed)
        if difference is not None:
            yield Finding("hole" if difference == "is missing" else "damage", name, difference)


def _compare_digest(path: Path, name: str, digest: str) -> Iterator[Finding]:
    file = path / name
    if not file.is_file():
        yield Finding("hole", name, "is missing")
    elif hash_file(file) != digest:
        yield Finding("damage", name, "fails its checksum")
