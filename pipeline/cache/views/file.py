"""What a view says of itself: rows of which finished caches it is made of.

    view.json -> parts in order, each a cache, the rows taken of it, overlays
    rows/<sha256>.arrow -> runs of rows

view.json is written last, by rename, after what it speaks of. It holds digests of manifests, which
hold those of everything else: whoever trusts it need trust no other folder.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.cache.documents import VERSION, parse_document, read_json, write_sealed
from pipeline.cache.index.splits import RUNS, RowRuns, read_table, require_runs
from pipeline.cache.names import Address, require_inside
from pipeline.cache.signals.spec import optional
from pipeline.config import StrictModel, canonical_json
from pipeline.errors import CacheError
from pipeline.storage import as_path, hash_file, is_local, write_bytes

VIEW = "view.json"

MOST_SOURCES = 20_000  # parts and overlays of a view; each takes half a millisecond to open

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Source(StrictModel):
    """Rows of a cache.

    Attributes:
        path: of the cache, from the view's folder, or a URL.
        digest: of its manifest.
        rows: sha256 of rows/<sha256>.arrow; None takes all rows.
    """

    path: Address
    digest: Sha256
    rows: Sha256 | None = optional()


class OverlaySource(Source):
    """Rows of a cache that says more of the examples of a part, row by row.

    Attributes:
        targets: whether its targets take the place of the part's.
    """

    targets: bool = optional(False)


class PartSource(Source):
    """One part of a view, with its overlays, of which a later one adds to the earlier."""

    overlays: list[OverlaySource] = optional([])


class ViewFile(StrictModel):
    """The content of view.json.

    Attributes:
        parts: whose rows follow one another.
    """

    version: Literal[1] = VERSION
    parts: list[PartSource] = Field(min_length=1)

    @model_validator(mode="after")
    def _require_few(self) -> Self:
        require_few_sources(sum(1 + len(part.overlays) for part in self.parts))
        return self

    @property
    def digest(self) -> str:
        """sha256 of what is seen through the view, wherever the caches lie."""
        dump = self.model_dump(mode="json")
        for part in dump["parts"]:
            for source in (part, *part.get("overlays", [])):
                del source["path"]
        return hashlib.sha256(canonical_json(dump).encode()).hexdigest()


def require_few_sources(count: int) -> None:
    """Refuse a view of more parts and overlays than anybody opens.

    Raises:
        ValueError: see `MOST_SOURCES`.
    """
    if count > MOST_SOURCES:
        raise ValueError(f"{count:,} parts and overlays, a view has {MOST_SOURCES:,} at most")


def is_view(path: Path) -> bool:
    """Whether a folder holds a view."""
    return (path / VIEW).is_file()


def write_view_file(path: Path, view: ViewFile) -> None:
    """Write view.json, which makes the view whole."""
    write_sealed(path / VIEW, view.model_dump(mode="json"))


def read_view_file(path: Path) -> ViewFile:
    """Read <view>/view.json.

    Raises:
        CacheError: it is damaged, or of a newer format.
    """
    require_inside(path, [path / VIEW])
    raw = read_json(path / VIEW, require_seal=True, remedy="make the view again")
    return parse_document(ViewFile, raw, path / VIEW)


def write_runs(path: Path, rows: RowRuns) -> str:
    """Write rows that a view takes of a cache, under the sha256 that is returned."""
    table = pa.table({"first_row": rows.starts, "rows": rows.counts})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()
    write_bytes(_runs_file(path, digest), content)
    return digest


def read_runs(path: Path, digest: str, limit: int) -> RowRuns:
    """Read what `write_runs` wrote.

    Args:
        limit: the rows of the cache that they are taken of.

    Raises:
        CacheError: the file is missing or damaged, or speaks of rows that the cache does not have.
    """
    file = _runs_file(path, digest)
    require_inside(path, [file])
    if not file.is_file() or hash_file(file) != digest:
        raise CacheError(f"{file}: is missing or damaged; copy or make the view again")
    table = read_table(file, RUNS)
    return require_runs(RowRuns(*(table[name].to_numpy() for name in RUNS)), limit, file)


def _runs_file(path: Path, digest: str) -> Path:
    return path / "rows" / f"{digest}.arrow"


def relate(cache: Path, folder: Path) -> str:
    """The path of a cache from the folder of a view, so that both can be moved together; its URL
    where it lies in a store, but not in this folder.

    Raises:
        CacheError: the view lies in a store and the cache on this machine.
    """
    if is_local(cache) and is_local(folder):
        target, origin = cache.resolve().parts, folder.resolve().parts
        pairs = enumerate(zip(target, origin, strict=False))
        shared = next((at for at, (a, b) in pairs if a != b), min(len(target), len(origin)))
        return "/".join([".."] * (len(origin) - shared) + list(target[shared:])) or "."
    if is_local(cache):
        raise CacheError(
            f"{folder}: a view in a store cannot speak of {cache} on this machine; copy the cache"
            " there, or give the view a folder here"
        )
    return str(cache).removeprefix(f"{folder}/")


def find_cache(folder: Path, path: str) -> Path:
    """The folder of a cache that `relate` gave the path of."""
    if "://" in path:
        return as_path(path)
    return (folder.resolve() / path).resolve() if is_local(folder) else folder / path


def list_folders(path: Path) -> list[Path]:
    """The folders of all caches that a view speaks of, overlays too, each once.

    Raises:
        CacheError: view.json is damaged.
    """
    parts = read_view_file(path).parts
    named = [source.path for part in parts for source in (part, *part.overlays)]
    return list(dict.fromkeys(find_cache(path, name) for name in named))
