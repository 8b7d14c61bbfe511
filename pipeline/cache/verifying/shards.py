"""One shard, byte by byte, and what its bytes mean.

shard.json -- its checksum, and the index's -> files: sizes, sha256 -> record batches, chunks:
    decoded, checked as the writer did, counted, compared with shard.json
"""

import hashlib
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.accepting import check_example
from pipeline.cache.columns import name_damaged
from pipeline.cache.documents import read_json
from pipeline.cache.index.contents import CONTENTS, read_shard_contents
from pipeline.cache.index.gathering import keep_columns
from pipeline.cache.manifest import Draft, ShardInfo
from pipeline.cache.record_batch import Batch
from pipeline.cache.rows import make_schema
from pipeline.cache.shards import HIDDEN, ROWS, SHARD, Shard
from pipeline.cache.signals.chunks import CHUNK_ROWS
from pipeline.cache.signals.quantization import SCALE
from pipeline.cache.signals.spec import list_arrays
from pipeline.cache.verifying.brought import Brought
from pipeline.cache.verifying.findings import Finding, Kind
from pipeline.errors import CacheError, StillroomError
from pipeline.examples import CachedExample
from pipeline.identity import digest_example
from pipeline.targets import Targets

_EXCESS = 1e-3  # of the mass of kept classes above 1, which rounding may make


class ShardCheck:
    """Checks one shard.

    Attributes:
        info: what its shard.json says, None where that cannot be believed.
        findings: what is wrong.
    """

    def __init__(
        self,
        files: Brought,
        index: int,
        draft: Draft | None,
        digest: str | None,
        sealed: bool,
    ) -> None:
        """Check every byte of it.

        Args:
            files: of the shard, which `decode` reads too.
            index: its number.
            draft: of the cache, None where it is lost.
            digest: sha256 of its shard.json in the index, None without one.
            sealed: whether its shard.json must have a checksum.
        """
        self.info: ShardInfo | None = None
        self.findings: list[Finding] = []
        self._files = files
        self._index, self._draft = index, draft
        self._digest = ""
        if SHARD not in files.sizes:
            self._add("hole", SHARD, "is missing")
            return
        try:
            info, self._digest = files.read_shard(require_seal=sealed)
        except CacheError as error:
            self._add("damage", SHARD, shorten(error, files.folder / SHARD))
            return
        if digest is not None and self._digest != digest:
            self._add("damage", SHARD, "is not the one that the index was written for")
            return
        self.info = info
        self._check_files(info)

    @property
    def sound(self) -> bool:
        """Whether nothing but orphans was found."""
        return all(finding.kind == "orphan" for finding in self.findings)

    def decode(self) -> None:
        """Check what its bytes mean."""
        info, draft = self.info, self._draft
        if info is None or draft is None or not self.sound:
            return
        own = {"index": self._index, "examples": draft.shard_size(self._index)}
        own["first_row"] = self._index * draft.shard_examples
        for name, expected in own.items():
            self._compare(name, getattr(info, name), expected)
        try:
            shard = Shard(self._files.folder, draft, self._digest)
            self._check_rows(shard, draft, info)
            self._check_hidden(shard, draft, info)
        except StillroomError as error:
            self._add("damage", ROWS, shorten(error, self._files.folder))
        if self.sound:  # the index, which is compared with them, need not ask the store again
            keep_columns(self._files.folder, self._files.home, draft, info, self._digest)

    def _add(self, kind: Kind, name: str, what: str) -> None:
        self.findings.append(
            Finding(kind, f"shards/{self._files.home.name}/{name}", what, self._index)
        )

    def _compare(self, name: str, found: Any, expected: Any) -> None:
        if found != expected:
            self._add("count", SHARD, f"says {name} {found}, expected {expected}")

    def _check_files(self, info: ShardInfo) -> None:
        for name in info.files:
            difference = self._files.find_difference(name, info.files)
            if difference is None:
                continue
            if difference == "is missing":
                self._add("hole", name, difference)
                continue
            where = "".join(f"; {place}" for place in self._locate(name, info))
            self._add("damage", name, difference + where)
        listed = {SHARD, *info.files}
        for name in sorted(self._files.sizes.keys() - listed):
            self._add("orphan", name, "belongs to nothing")

    def _locate(self, name: str, info: ShardInfo) -> Iterator[str]:
        """Which columns, record batches or chunks of a file are damaged."""
        if name.startswith(f"{HIDDEN}/"):
            yield f"signal {name.split('/')[1]}"
        if name != ROWS:
            return
        with (self._files.folder / name).open("rb") as file:
            found = False
            for number, (_, start, size, checksum) in enumerate(info.batches):
                file.seek(start)
                content = pa.py_buffer(file.read(size))
                if google_crc32c.value(content) != checksum:
                    found = True
                    yield f"record batch {number}"
                    if self._draft is not None and number < len(info.columns):
                        schema = make_schema(self._draft)
                        for column in name_damaged(content, schema, info.columns[number]):
                            yield f"column {column}"
            if not found:
                yield "its schema or footer"

    def _check_rows(self, shard: Shard, draft: Draft, info: ShardInfo) -> None:
        counts = dict.fromkeys(("examples", "targets", "features", "tokens"), 0)
        ids, contents = hashlib.sha256(), []
        for number in range(len(info.batches)):
            batch = shard.read_batch(number)
            self._compare(f"batches.{number}", info.batches[number][0], len(batch))
            for row in range(len(batch)):
                example = self._check_row(batch, row, draft, counts["features"])
                features = batch.features(row)
                counts["examples"] += 1
                counts["targets"] += len(example.target_positions)
                counts["features"] += features.stop - features.start
                counts["tokens"] += len(example.input_ids)
                ids.update(f"{example.example_id}\n".encode())
                contents.append(digest_example(example))
        for name, count in counts.items():
            self._compare(name, getattr(info, name), count)
        self._compare("ids", info.ids, ids.hexdigest())
        if CONTENTS in info.files:
            kept = read_shard_contents(self._files.folder, info.files[CONTENTS][1])
            if kept.to_pylist() != contents:
                self._add("damage", CONTENTS, f"differs from the examples in {ROWS}")

    def _check_row(self, batch: Batch, row: int, draft: Draft, features: int) -> CachedExample:
        example = batch.example(row, {})
        for what in find_faults(example, draft):
            self._add("damage", ROWS, what)
        if batch.features(row).start != (features if batch.features(row).stop else 0):
            self._add("damage", ROWS, f"example {example.example_id!r}: feature_start is wrong")
        return example

    def _check_hidden(self, shard: Shard, draft: Draft, info: ShardInfo) -> None:
        for name, signal in draft.signals.items():
            rows = info.examples if signal.per == "example" else info.features
            for block in range(-(-rows // CHUNK_ROWS)):
                count = min(CHUNK_ROWS, rows - block * CHUNK_ROWS)
                values = torch.empty(count, signal.width)
                shard.read_block(name, block).decode(slice(0, count), values)
                if not bool(torch.isfinite(values).all()):
                    self._add("damage", f"{HIDDEN}/{name}", f"chunk {block} holds NaN or infinity")
        for array, kind in list_arrays(draft.signals).items():
            name = f"{HIDDEN}/{array}/zarr.json"
            signal = draft.signals[array.removesuffix(SCALE)]
            rows = info.examples if signal.per == "example" else info.features
            described = read_json(self._files.folder / name)
            expected = {"shape": [rows, kind.width], "data_type": kind.dtype, "zarr_format": 3}
            found = {key: described.get(key) for key in expected}
            if found != expected:
                self._add("damage", name, f"describes {found}, expected {expected}")


def find_faults(example: CachedExample, draft: Draft) -> Iterator[str]:
    """What its writer would have refused of an example; its hidden states are not looked at."""
    bare = copy(example)
    vars(bare)["hidden"] = {}
    try:
        check_example(bare, draft.model_copy(update={"signals": {}}))
    except StillroomError as error:
        yield str(error)
    else:
        for temperature in find_excess(example.targets):
            yield (
                f"example {example.example_id!r}: probabilities of kept classes sum to more than 1"
                f" at temperature {temperature:g}"
            )
    positions = example.target_positions
    if len(positions) and not (
        0 <= positions.min() <= positions.max() < len(example.input_ids)
        and bool((np.diff(positions) >= 0).all())
    ):
        yield f"example {example.example_id!r}: its target positions are outside of it or unsorted"


def find_excess(targets: Targets) -> Iterator[float]:
    """The temperatures at which the kept classes of some target have a mass above 1, as they have
    where its normaliser is below its highest logit.

    A reader does not look at it: that adds a fifth to the time of decoding 64 kept classes at two
    temperatures, and the losses clamp the mass that is left at 0.
    """
    logits = targets.logits.double()
    for temperature, logsumexp in zip(targets.temperatures, targets.logsumexp.T, strict=True):
        mass = (logits / temperature - logsumexp[:, None]).exp().sum(dim=1)
        # What float32 leaves uncertain of a normaliser is a share of it.
        if bool((mass > 1 + _EXCESS + logsumexp.abs() * 2**-20).any()):
            yield temperature


def shorten(error: Exception, subject: Path) -> str:
    """What an error says of a subject, or of a file in it."""
    return str(error).removeprefix(f"{subject}: ").removeprefix(f"{subject}/")
