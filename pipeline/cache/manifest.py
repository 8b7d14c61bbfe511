"""What a cache says about itself: the draft it was begun with, its shards, its identity.

    draft.json (while it is written) -> shards/NNNNN/shard.json -> manifest.json, written last

A cache is a pure function of its inputs, so nothing here holds a time or a speed. Everything a
reader needs to decode the files, the codec included, is read from here and never asked again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from pipeline.cache.codecs import CODECS, MAX_CLASSES, Codec, Layout, Steps
from pipeline.cache.fidelity import Fidelity
from pipeline.cache.signals import Signal, optional
from pipeline.config import Model, StrictModel, canonical_json, member_of, parse_config
from pipeline.errors import CacheError, ConfigError, MismatchError
from pipeline.positions import Positions

VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
DRAFT = "draft.json"

Digested = dict[str, JsonValue]
ColumnType = Literal["string", "int64", "float64", "bool", "strings"]


class TargetsSpec(StrictModel):
    """What is kept of the teacher's distribution at each target.

    Attributes:
        top_k: K, the classes with the highest logits; "all" keeps every class.
        tail_draws: R, ids drawn with replacement from the distribution without the kept classes.
        temperatures: those at which targets shall be exact; 1 is always one of them.
        codec: how entries are written.
        compression: of what is written, input tokens and all. lz4 takes a third more bytes than
            zstd and a fraction of the time to read; none takes three times as many.
    """

    top_k: Annotated[int, Field(ge=0)] | Literal["all"] = 64
    tail_draws: int = Field(default=0, ge=0)
    temperatures: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (1.0,)
    codec: Annotated[Codec, *member_of(CODECS, "codec")] = Steps()
    compression: Literal["zstd", "lz4", "none"] = optional("zstd")

    @field_validator("temperatures")
    @classmethod
    def _sort_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({1.0, *temperatures}))

    @model_validator(mode="after")
    def _require_entries(self) -> Self:
        if self.top_k == 0 and self.tail_draws == 0:
            raise ValueError("keeps nothing; set top_k or tail_draws above 0")
        return self

    def resolve(self, num_classes: int) -> "TargetsSpec":
        """Return the same with `top_k` as a number.

        Raises:
            ConfigError: K above V, draws where nothing is cut off, or too many classes.
        """
        top_k = num_classes if self.top_k == "all" else self.top_k
        if not 0 < num_classes <= MAX_CLASSES:
            raise ConfigError(
                f"targets: {num_classes:,} classes; a cache holds between 1 and {MAX_CLASSES:,}"
            )
        if top_k > num_classes:
            raise ConfigError(
                f"targets.top_k: {top_k:,} is more than the {num_classes:,} classes of the teacher;"
                " lower it, or set it to all"
            )
        if top_k == num_classes and self.tail_draws:
            raise ConfigError(
                f"targets.tail_draws: {self.tail_draws} draws, but top_k keeps all {num_classes:,}"
                " classes and leaves no tail; set tail_draws to 0 or lower top_k"
            )
        return self.model_copy(update={"top_k": top_k})


class Identity(StrictModel):
    """What the cache was made from, each part with a `digest` of its content."""

    data: Digested
    preprocessing: Digested
    tokenizer: Digested
    teacher: Digested


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
        shard_examples: examples per shard, fewer in the last.
        num_examples: of the whole cache.
    """

    identity: Identity
    task: Digested
    targets: TargetsSpec
    num_classes: int = Field(gt=0, le=MAX_CLASSES)
    shifted: bool
    signals: dict[str, Signal] = Field(default_factory=dict)
    positions: Positions = optional("all")
    label_names: list[str] | None = None
    columns: dict[str, ColumnType] = Field(default_factory=dict)
    shard_examples: int = Field(gt=0)
    num_examples: int = Field(ge=0)

    @field_validator("targets")
    @classmethod
    def _require_number(cls, targets: TargetsSpec) -> TargetsSpec:
        if targets.top_k == "all":
            raise ValueError("top_k must be a number here; call resolve() first")
        return targets.model_copy(update={"codec": targets.codec.resolve(int(targets.top_k))})

    @property
    def layout(self) -> Layout:
        """V, K, R and the temperatures."""
        kept = self.targets
        return Layout(self.num_classes, int(kept.top_k), kept.tail_draws, kept.temperatures)

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
    """

    index: int
    first_row: int
    examples: int
    targets: int
    features: int
    tokens: int
    batches: list[tuple[int, int, int, int]]
    ids: str
    frequent_ids: str
    files: dict[str, tuple[int, str]]
    fidelity: dict[str, Fidelity] = optional({})

    @property
    def bytes(self) -> int:
        """Size of the shard's files, shard.json not counted."""
        return sum(size for size, _ in self.files.values())


class Totals(StrictModel):
    """Sums over the shards."""

    examples: int
    targets: int
    features: int
    tokens: int
    bytes: int


class Manifest(Draft):
    """The content of manifest.json: the draft, the totals, and what the shards hang on.

    Attributes:
        shards: sha256 of index/shards.arrow, which has the sha256 of each shard.json, which has
            those of its files. So the manifest is as small for 10^5 shards as for one.
        projections, head: sha256 of projections.safetensors and head.safetensors, None without.
        fidelity: see `ShardInfo`.
    """

    version: Literal[1] = VERSION
    shards: str
    projections: str | None = optional()
    head: str | None = optional()
    fidelity: dict[str, Fidelity] = optional({})
    totals: Totals

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: two caches with one digest hold the same bytes."""
        text = canonical_json(self.model_dump(mode="json"))
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read <cache>/manifest.json.

    Raises:
        CacheError: no cache, an unfinished one, a damaged manifest, or a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CacheError(f"{path}: {_describe_absence(path)}")
    raw = read_json(file)
    version = raw.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CacheError(
            f"{path}: cache format {version}, this Stillroom reads up to {VERSION}; install a newer"
            " Stillroom, or cache the teacher again with this one"
        )
    return _parse(Manifest, raw, file)


def read_draft(path: Path) -> Draft:
    """Read <cache>/draft.json."""
    return _parse(Draft, read_json(path / DRAFT), path / DRAFT)


def read_shard(folder: Path) -> ShardInfo:
    """Read <shard>/shard.json."""
    return _parse(ShardInfo, read_json(folder / "shard.json"), folder / "shard.json")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CacheError: missing, damaged, or no object.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{file}: cannot be read ({error}); cache the teacher again") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{file}: holds no object; cache the teacher again")
    return raw


def require_same(
    subject: Path, cached: Mapping[str, Any], asked: Mapping[str, Any], remedy: str
) -> None:
    """Compare two dumps (draft, identity or a part of it) field by field.

    Raises:
        MismatchError: names the fields that differ, each with found and expected, then `remedy`.
    """
    found = list(_differences(cached, asked, ""))
    if not found:
        return
    # A digest says that something differs; a field beside it says what, so it is named first.
    found.sort(key=lambda line: line.split(" ", 1)[0].endswith("digest"))
    more = f", and {len(found) - 4} fields more" if len(found) > 4 else ""
    raise MismatchError(f"{subject}: {'; '.join(found[:4])}{more}. {remedy}")


def _differences(cached: Any, asked: Any, where: str) -> Iterator[str]:
    if isinstance(cached, Mapping) and isinstance(asked, Mapping):
        for key in sorted({*cached, *asked}):
            here = f"{where}.{key}" if where else str(key)
            yield from _differences(cached.get(key), asked.get(key), here)
    elif cached != asked:
        yield f"cached with {where} {_show(cached)}, asked for {_show(asked)}"


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) >= 32 and set(value) <= set("0123456789abcdef"):
        return f"{value[:8]}…"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


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


def _parse(model: type[Model], raw: dict[str, Any], file: Path) -> Model:
    try:
        return parse_config(model, raw, str(file))
    except (ConfigError, ValidationError) as error:
        raise CacheError(f"{error}; the file is damaged, cache the teacher again") from error
