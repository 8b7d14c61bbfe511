"""What a cache says about itself: the draft it was begun with, its shards, its identity.

    draft.json (while it is written) -> shards/NNNNN/shard.json -> manifest.json, written last

A cache is a pure function of its inputs, so nothing here holds a time or a speed. Everything a
reader needs to decode the files, the codec included, is read from here and never asked again.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from pipeline.cache.codecs import MAX_CLASSES, Layout
from pipeline.cache.documents import (
    VERSION,
    parse_document,
    parse_json,
    read_hashed,
    read_json,
    write_sealed,
)
from pipeline.cache.imported import Imported
from pipeline.cache.names import FileName, PlainName
from pipeline.cache.signals.fidelity import Fidelity
from pipeline.cache.signals.spec import Signal, optional
from pipeline.cache.targets_spec import TargetsSpec
from pipeline.config import StrictModel, canonical_json
from pipeline.errors import CacheError
from pipeline.positions import Positions

MANIFEST = "manifest.json"
DRAFT = "draft.json"
DRAFTS = "drafts"  # of shards, while they are written
_MOST_TEMPERATURES = 64

Digested = dict[str, JsonValue]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Files = dict[FileName, tuple[Count, str]]
ColumnType = Literal["string", "int64", "float64", "bool", "strings"]


class Identity(StrictModel):
    """What the cache was made from, each part with a `digest` of its content."""

    data: Digested
    preprocessing: Digested
    tokenizer: Digested
    teacher: Digested

    @field_validator("*")
    @classmethod
    def _require_digest(cls, part: Digested) -> Digested:
        if not isinstance(part.get("digest"), str):
            raise ValueError("has no digest")
        return part


class Draft(StrictModel):
    """All that is fixed before the first shard is written.

    Attributes:
        identity: what it is made from.
        task: the task's configuration; the cache only keeps it.
        targets: with `top_k` as a number (`TargetsSpec.resolve`).
        num_classes: V.
        shifted: label_ids[n] is the token at target_positions[n] + 1; checked on every read.
        signals, positions: hidden states by name, and where they are kept.
        label_names: [V] where the classes have names.
        columns: the columns carried through, with their types.
        imported: where the targets are from somebody's dump: its format and what it leaves open.
        shard_examples: examples per shard, fewer in the last.
        num_examples: of the whole cache.
    """

    identity: Identity
    task: Digested
    targets: TargetsSpec
    num_classes: int = Field(gt=0, le=MAX_CLASSES)
    shifted: bool
    signals: dict[PlainName, Signal] = Field(default_factory=dict)
    positions: Positions = optional("all")
    label_names: list[str] | None = None
    columns: dict[str, ColumnType] = Field(default_factory=dict)
    imported: Imported | None = optional()
    shard_examples: int = Field(gt=0, lt=2**40)
    num_examples: int = Field(ge=0, lt=2**40)

    @field_validator("task")
    @classmethod
    def _require_name(cls, task: Digested) -> Digested:
        if not isinstance(task.get("name"), str):
            raise ValueError("has no name")
        return task

    @field_validator("targets")
    @classmethod
    def _require_number(cls, targets: TargetsSpec) -> TargetsSpec:
        if targets.top_k == "all":
            raise ValueError("top_k must be a number here; call resolve() first")
        return targets.model_copy(update={"codec": targets.codec.resolve(int(targets.top_k))})

    @model_validator(mode="after")
    def _require_fitting(self) -> Self:
        """What was never written like this is not what it says; sizes follow from these numbers."""
        kept = self.targets
        if not int(kept.top_k) <= self.num_classes or kept.tail_draws > MAX_CLASSES:
            raise ValueError(
                f"keeps {kept.top_k} classes and {kept.tail_draws} draws of {self.num_classes}"
            )
        if len(kept.temperatures) > _MOST_TEMPERATURES:
            raise ValueError(f"has {len(kept.temperatures)} temperatures")
        names, labels = self.label_names, self.task["name"] == "multi-label-classification"
        if names is not None and len(names) != self.num_classes and not labels:
            raise ValueError(f"names {len(names)} of {self.num_classes} classes")
        return self

    @property
    def layout(self) -> Layout:
        """V, K, R and the temperatures."""
        kept = self.targets
        return Layout(self.num_classes, int(kept.top_k), kept.tail_draws, kept.temperatures)

    @property
    def own_digest(self) -> str:
        """sha256 of the draft, of a manifest too, by which its shards know it."""
        text = canonical_json(self.model_dump(mode="json", include=set(Draft.model_fields)))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        """How many shards the whole cache has."""
        return -(-self.num_examples // self.shard_examples)

    def shard_size(self, index: int) -> int:
        """How many examples a shard holds."""
        return min(self.shard_examples, self.num_examples - index * self.shard_examples)


class ShardInfo(StrictModel):
    """The content of shard.json.

    Attributes:
        index: the shard's number; first_row: the row of the cache it begins with.
        examples, targets, features, tokens: counts.
        batches: of each record batch of rows.arrow: examples, start in the file, bytes, CRC-32C.
        ids: sha256 of its example ids, each followed by a newline.
        frequent_ids: the classes with the smallest numbers, see `Ranking`.
        files: path inside the shard -> [bytes, sha256]; fidelity: of the first shard's signals.
        draft: `Draft.own_digest` of what it was written for.
        projections: sha256 of projections.safetensors, None where nothing is projected.
        columns: of each record batch, CRC-32C of each column; see `sum_columns`.
        skipped: the ids that the teacher could not answer, and why; their rows have no targets.
    """

    index: Count
    first_row: Count
    examples: Count
    targets: Count
    features: Count
    tokens: Count
    batches: list[tuple[Count, Count, Count, Count]]
    ids: str
    frequent_ids: str
    files: Files
    fidelity: dict[str, Fidelity] = optional({})
    draft: str | None = optional()
    projections: str | None = optional()
    columns: list[list[Count]] = optional([])
    skipped: dict[str, str] = optional({})

    @property
    def bytes(self) -> int:
        """Size of the shard's files, shard.json not counted."""
        return sum(size for size, _ in self.files.values())


class Totals(StrictModel):
    """Sums over the shards."""

    examples: Count
    targets: Count
    features: Count
    tokens: Count
    bytes: Count


class Manifest(Draft):
    """The content of manifest.json: the draft, the totals, and what the shards hang on.

    Attributes:
        shards: sha256 of index/shards.arrow, which has the sha256 of each shard.json, which has
            those of its files. So the manifest is as small for 10^5 shards as for one.
        projections, head: sha256 of projections.safetensors and head.safetensors, None without.
        fidelity: see `ShardInfo`.
        files: path -> [bytes, sha256] of what stands outside of shards/, the tokenizer too; empty
            in caches that were written before it.
        skipped: those of all shards, see `ShardInfo`.
    """

    version: Literal[1] = VERSION
    shards: str
    projections: str | None = optional()
    head: str | None = optional()
    fidelity: dict[str, Fidelity] = optional({})
    totals: Totals
    files: Files = optional({})
    skipped: dict[str, str] = optional({})

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON but for `files`: two caches with one digest hold the same
        bytes, whatever index and tokenizer stand beside them."""
        text = canonical_json(self.model_dump(mode="json", exclude={"files"}))
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read <cache>/manifest.json.

    Raises:
        CacheError: no cache, an unfinished one, a damaged manifest, or a newer format.
    """
    file = path / MANIFEST
    try:
        raw = unseal_manifest(path)
    except CacheError as error:
        if file.is_file():  # asked only now: in a store that is a request
            raise
        raise CacheError(f"{path}: {_describe_absence(path)}") from error
    return parse_document(Manifest, raw, file)


def unseal_manifest(path: Path) -> dict[str, Any]:
    """The JSON of manifest.json, after its checksum.

    Raises:
        CacheError: it is missing or damaged.
    """
    # A manifest that has `files` is as young as the checksum, which therefore must be there.
    return read_json(path / MANIFEST, require_seal="files")


def write_manifest(path: Path, manifest: Manifest, beside: Path | None = None) -> None:
    """Write <cache>/manifest.json, which makes the cache whole; beside what, see `write_bytes`."""
    content = {"version": manifest.version} | manifest.model_dump(mode="json")
    write_sealed(path / MANIFEST, content, beside)


def read_draft(path: Path) -> Draft:
    """Read <cache>/draft.json, every key of it: it is what the other shards are written by."""
    return parse_document(Draft, read_json(path / DRAFT), path / DRAFT, whole=True)


def read_shard(folder: Path) -> ShardInfo:
    """Read <shard>/shard.json."""
    return read_shard_hashed(folder)[0]


def parse_shard(file: Path, content: bytes) -> ShardInfo:
    """The same, where its bytes have been read."""
    return parse_document(ShardInfo, parse_json(file, content), file)


def read_shard_hashed(folder: Path, require_seal: bool = False) -> tuple[ShardInfo, str]:
    """Read <shard>/shard.json, with its sha256; see `read_json`."""
    file = folder / "shard.json"
    raw, sha256 = read_hashed(file, require_seal)
    return parse_document(ShardInfo, raw, file), sha256


def _describe_absence(path: Path) -> str:
    if not path.exists():
        return "no such folder; cache a teacher there with `stillroom cache-teacher`"
    if not (path / DRAFT).is_file():
        return f"is no cache (it holds no {MANIFEST}); give a folder of `stillroom cache-teacher`"
    standing = len(list(path.glob("shards/*/shard.json")))
    return (
        f"the cache is not finished, {standing} of {read_draft(path).num_shards} shards stand;"
        " run its `stillroom cache-teacher` command again to continue"
    )
