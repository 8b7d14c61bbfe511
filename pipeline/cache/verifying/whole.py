"""Is a cache what it was written as? Every byte of it, what the bytes mean, and what is missing.

    manifest.json or draft.json -> what stands beside the shards -> the shards, several at a time
        -> the index, made anew and compared -> Report

A sample looks at some examples in place of the shards: at the record batches and chunks that hold
them, and at whether the index finds them.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.cache.documents import SEAL
from pipeline.cache.index.making import write_index
from pipeline.cache.index.splits import hex_digest, read_shards, read_table
from pipeline.cache.manifest import (
    DRAFT,
    MANIFEST,
    Draft,
    Manifest,
    read_draft,
    read_manifest,
    unseal_manifest,
)
from pipeline.cache.reader import TeacherCache
from pipeline.cache.shards import SHARD, shard_folder
from pipeline.cache.signals.projection import FILE as PROJECTIONS_FILE
from pipeline.cache.verifying.beside import check_beside
from pipeline.cache.verifying.brought import bringing
from pipeline.cache.verifying.findings import Finding, Kind, Report
from pipeline.cache.verifying.sample import check_row
from pipeline.cache.verifying.shards import ShardCheck, shorten
from pipeline.errors import CacheError, DataError
from pipeline.storage import hash_file, list_files


@dataclass(frozen=True)
class Depth:
    """How closely to look.

    Attributes:
        decode: what the bytes mean too, not only whether they are those that were written.
        sample: examples in place of whole shards, drawn with `seed`; None for all.
        jobs: shards, or examples, at a time.
    """

    decode: bool = True
    sample: int | None = None
    seed: int = 0
    jobs: int = 4


def verify_cache(
    path: Path,
    depth: Depth = Depth(),
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Check a cache.

    Args:
        advance: told how many shards, or examples of a sample, are done, and of how many.

    Raises:
        CacheError: there is no cache, it is of a newer format, or a sample was asked of one that is
            unfinished or has no sound manifest.
    """
    check = _Check(path, depth, advance)
    if depth.sample is None:
        check.check_shards()
    else:
        check.check_sample(depth.sample)
    return check.report()


class _Check:
    """One pass over a cache."""

    def __init__(self, path: Path, depth: Depth, advance: Callable[[int, int], object]) -> None:
        self._path, self._depth, self._advance = path, depth, advance
        self._finished = (path / MANIFEST).is_file()
        self._findings: list[Finding] = []
        self._pending: list[int] = []
        self._checked = self._bytes = 0
        self._sealed = False  # whether it is so new that every document has a checksum
        self._manifest = self._read_manifest()
        self._draft = self._manifest or self._read_draft()
        self._digests: np.ndarray | None = None
        if self._manifest is not None:
            self._findings += check_beside(self._path, self._manifest)
            with suppress(CacheError):  # which has been found already
                self._digests = read_shards(path, self._manifest.shards, self._manifest.num_shards)
        self._shards = self._list_shards()

    def report(self) -> Report:
        return Report(
            path=str(self._path),
            finished=self._finished,
            shards=len(self._shards),
            pending=sorted(self._pending),
            checked=self._checked,
            bytes=self._bytes,
            findings=sorted(self._findings, key=lambda finding: (finding.file, finding.what)),
        )

    def check_shards(self) -> None:
        """Every byte of every shard; then their sum and the index."""
        checks = []
        with ThreadPoolExecutor(self._depth.jobs) as pool:
            for done, check in enumerate(pool.map(self._check_shard, self._shards), 1):
                if check is not None:
                    checks.append(check)
                    self._findings += check.findings
                self._advance(done, len(self._shards))
        infos = [check.info for check in checks if check.info is not None]
        self._checked = sum(info.examples for info in infos)
        self._bytes = sum(info.bytes for info in infos)
        self._find_strangers()
        if self._manifest is None:
            self._check_projections({info.projections for info in infos} - {None})
        if self._manifest is None or len(infos) < len(self._shards):
            return
        for name, found in self._manifest.totals:
            total = sum(getattr(info, name) for info in infos)
            if found != total:
                self._add("count", MANIFEST, f"says totals.{name} {found:,}, expected {total:,}")
        if self._depth.decode and not any(finding.shard is not None for finding in self._findings):
            self._check_index(self._manifest)

    def check_sample(self, count: int) -> None:
        """Some examples, drawn from the whole cache."""
        if self._manifest is None:
            raise CacheError(
                f"{self._path}: a sample needs a finished cache with a sound {MANIFEST}; verify it"
                " without --sample"
            )
        total = self._manifest.num_examples
        rng = np.random.default_rng(self._depth.seed)
        rows = np.sort(rng.choice(total, min(count, total), replace=False)).tolist()
        cache = TeacherCache(self._path, self._manifest)
        with ThreadPoolExecutor(self._depth.jobs) as pool:
            checks = pool.map(lambda row: list(check_row(cache, row)), rows)
            for done, findings in enumerate(checks, 1):
                # What is wrong with a batch is so for each of its examples.
                self._findings += [one for one in findings if one not in self._findings]
                self._advance(done, len(rows))
        self._checked = len(rows)

    def _read_manifest(self) -> Manifest | None:
        if not self._finished:
            if not (self._path / DRAFT).is_file():
                if not (self._path / "shards").is_dir():
                    read_manifest(self._path)  # tells what is there in place of a cache
                self._add("hole", MANIFEST, f"is missing, and so is {DRAFT}")
            return None
        try:
            self._sealed = "files" in unseal_manifest(self._path)
        except CacheError as error:
            self._add("damage", MANIFEST, shorten(error, self._path / MANIFEST))
            return None
        return read_manifest(self._path)

    def _read_draft(self) -> Draft | None:
        if not (self._path / DRAFT).is_file():
            return None
        try:
            draft = read_draft(self._path)
            self._sealed = SEAL in json.loads((self._path / DRAFT).read_bytes())
            return draft
        except CacheError as error:
            self._add("damage", DRAFT, shorten(error, self._path / DRAFT))
            return None

    def _add(self, kind: Kind, file: str, what: str) -> None:
        self._findings.append(Finding(kind, file, what))

    def _list_shards(self) -> list[int]:
        if self._draft is not None:
            return list(range(self._draft.num_shards))
        return sorted(int(name) for name in self._names() if name.isdigit())

    def _names(self) -> list[str]:
        shards = self._path / "shards"
        return [folder.name for folder in shards.iterdir()] if shards.is_dir() else []

    def _find_strangers(self) -> None:
        """What lies among the shards and is none."""
        known = {shard_folder(self._path, index).name for index in self._shards}
        for name in sorted(set(self._names()) - known):
            self._add("orphan", f"shards/{name}", "belongs to nothing")

    def _check_shard(self, index: int) -> ShardCheck | None:
        folder = shard_folder(self._path, index)
        if not self._finished and not (folder / SHARD).is_file():
            self._pending.append(index)
            return None
        digest = None if self._digests is None else hex_digest(self._digests, index)
        with bringing(folder) as files:
            check = ShardCheck(files, index, self._draft, digest, self._sealed)
            if self._depth.decode:
                check.decode()
        return check

    def _list_digests(self) -> list[str] | None:
        if self._digests is None:
            return None
        return [hex_digest(self._digests, index) for index in range(len(self._digests))]

    def _check_projections(self, digests: set[str | None]) -> None:
        """Compare the bases of an unfinished cache with what its shards say."""
        file = self._path / PROJECTIONS_FILE
        if digests and not file.is_file():
            self._add("hole", PROJECTIONS_FILE, "is missing")
        elif digests and digests != {hash_file(file)}:
            self._add("damage", PROJECTIONS_FILE, "is not what the shards were projected with")

    def _check_index(self, manifest: Manifest) -> None:
        """Make the index anew and compare it, if it is not known to be damaged."""
        damaged = {finding.file for finding in self._findings}
        with TemporaryDirectory() as folder:
            anew = Path(folder)
            try:
                write_index(self._path, manifest, anew, self._list_digests())
            except DataError as error:
                self._add("duplicate", "shards", str(error))
                return
            for name in sorted(list_files(anew)):
                if name in damaged or not (self._path / name).is_file():
                    continue  # told already, or written before there was such an index
                if not read_table(self._path / name).equals(read_table(anew / name)):
                    self._add("index", name, "differs from what the shards hold")
