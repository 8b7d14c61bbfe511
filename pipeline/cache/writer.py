"""Writing a cache so that a crash at any instant costs at most the shards that were under way.

    draft.json -> drafts/: rows.arrow, hidden.zarr, shard.json -> shards/ -> index -> manifest.json

A shard stands when its shard.json does, a cache when its manifest.json does; both appear by rename
after everything they speak of is on the disk. Nobody writes into a folder that may be another's,
not even a process that slept while others finished its shard. The same draft and examples give the
same bytes, in whatever order and however often interrupted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cache import output_head
from pipeline.cache.checksums import sum_files
from pipeline.cache.documents import require_same, write_sealed
from pipeline.cache.gaps import require_few
from pipeline.cache.index.gathering import keep_columns
from pipeline.cache.index.making import write_index
from pipeline.cache.manifest import (
    DRAFT,
    DRAFTS,
    MANIFEST,
    Draft,
    Manifest,
    ShardInfo,
    Totals,
    read_draft,
    read_manifest,
    read_shard,
    read_shard_hashed,
    write_manifest,
)
from pipeline.cache.rows import make_schema
from pipeline.cache.shard_writer import ShardWriter
from pipeline.cache.shards import SHARD, shard_folder
from pipeline.cache.signals.fidelity import Fidelity
from pipeline.cache.signals.projection import FILE, Bases
from pipeline.cache.views.file import VIEW, is_view
from pipeline.errors import CacheError, DataError
from pipeline.storage import (
    hash_file,
    is_local,
    list_files,
    remove_file,
    remove_tree,
    sync_folder,
    sync_tree,
    writing_folder,
)

# What stands beside the shards: folders, and files that reached the disk when they were written.
OUTSIDE = ("index", "tokenizer", FILE, output_head.FILE)

_FEW = 8  # shards that are looked for one by one; more are found by one listing


@dataclass(frozen=True, slots=True)
class Standing:
    """What the index and the manifest need to know of a shard that stands.

    Attributes:
        digest: sha256 of its shard.json.
        totals: in the order of `Totals`.
        skipped, fidelity: see `ShardInfo`.
    """

    digest: str
    totals: tuple[int, ...]
    skipped: Mapping[str, str]
    fidelity: Mapping[str, Fidelity]


class CacheWriter:
    """The folder of a cache under way.

    Attributes:
        path: the folder.
        draft: what it is begun with.
    """

    def __init__(self, path: Path, draft: Draft) -> None:
        """Begin a cache, or continue the one that was begun there.

        Raises:
            MismatchError: it was begun with another draft; names the fields.
            DataError: no examples, or a carried column of a reserved name.
            CacheError: the folder holds a view, or shards of unknown origin.
        """
        if draft.num_examples == 0:
            raise DataError(f"{path}: the data set has no examples; there is nothing to cache")
        make_schema(draft)
        self.path = path
        self.draft = draft
        if is_view(path):
            raise CacheError(f"{path}: holds a view ({VIEW}); give the cache another folder")
        begun = self._read_begun()
        if begun is None:
            write_sealed(path / DRAFT, draft.model_dump(mode="json"))
        else:
            remedy = "Cache the teacher again into another folder, or go back to those settings"
            require_same(path, _dump_draft(begun), _dump_draft(draft), remedy)
        self._projected = [name for name, signal in draft.signals.items() if signal.projection]
        self._bases = Bases(path, self._projected)
        self._standing: dict[int, Standing] = {}
        self._bytes = self._skipped = 0
        self._current: ShardWriter | None = None
        self._find_finished()

    @property
    def finished(self) -> Set[int]:
        """The shards that are known to stand and need not be written again."""
        return self._standing.keys()

    @property
    def bytes_written(self) -> int:
        """Bytes of the shards that stand and of the rows of the one under way."""
        current = self._current
        return self._bytes + (current.bytes_written if current else 0)

    @property
    def ready(self) -> bool:
        """Whether any shard may be written; else shard 0 comes first, which projections are fitted
        to, here or in another process."""
        if not self._bases.complete:
            self._bases = Bases(self.path, self._projected)
        return self._bases.complete

    def stands(self, index: int) -> bool:
        """Whether a shard need not be written, as it is there whole; looks for it."""
        if index not in self._standing and self.ready:
            self._note_whole(index, lambda: list_files(shard_folder(self.path, index)))
        return index in self._standing

    def list_missing(self) -> list[int]:
        """The shards that do not stand, ascending; looks for them."""
        missing = sorted(set(range(self.draft.num_shards)) - self.finished)
        if len(missing) > _FEW:
            self._find_finished()
            return [index for index in missing if index not in self._standing]
        return [index for index in missing if not self.stands(index)]

    @contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Write one shard; it stands when the block ends without an error.

        Raises:
            CacheError: the disk refused, or the number of examples is not the draft's.
        """
        if index in self.finished or not 0 <= index < self.draft.num_shards:
            raise ValueError(f"shard {index} is finished or outside {self.draft.num_shards}")
        if index and not self.ready:
            raise ValueError("shard 0 comes first: projections are fitted to it")
        folder = shard_folder(self.path, index)
        try:
            whole = partial(self.stands, index)
            with writing_folder(folder, SHARD, self.path / DRAFTS, whole) as local:
                self._current = writer = ShardWriter(local, self.draft, index, self._bases)
                try:
                    yield writer
                    info, digest = writer.commit()
                finally:
                    self._current = None
                    writer.abandon()
                keep_columns(local, folder, self.draft, info, digest)
        except OSError as error:
            raise CacheError(
                f"{folder}: cannot be written ({error.strerror or error}); {len(self.finished)} of"
                f" {self.draft.num_shards} shards are safe, run the same command again to continue"
            ) from error
        if index not in self._standing:
            self._note(index, info, digest)

    def finish(self) -> Manifest:
        """Write the index and, last, manifest.json; nothing where it stands already.

        Raises:
            CacheError: shards are missing.
            DataError: an example id that stands twice.
        """
        if (self.path / MANIFEST).is_file():
            return read_manifest(self.path)
        missing = self.list_missing()
        if missing:
            raise CacheError(
                f"{self.path}: {len(missing)} of {self.draft.num_shards} shards are missing, the"
                f" first is {missing[0]}; run the same command again to continue"
            )
        standing = [self._standing[index] for index in range(self.draft.num_shards)]
        digests = [shard.digest for shard in standing]
        shards = write_index(self.path, self.draft, self.path, digests)
        manifest = self._make_manifest(shards, standing)
        for folder in (self.path / part for part in OUTSIDE):
            if folder.is_dir():
                sync_tree(folder)
        write_manifest(self.path, manifest, beside=self.path / DRAFT)
        remove_file(self.path / DRAFT)
        if is_local(self.path):
            remove_tree(self.path / DRAFTS)
        sync_folder(self.path)
        return manifest

    def _read_begun(self) -> Draft | None:
        if (self.path / MANIFEST).is_file():
            return read_manifest(self.path)
        if (self.path / DRAFT).is_file():
            return read_draft(self.path)
        self._require_own()
        return None

    def _find_finished(self) -> None:
        """Note all shards that stand, by one listing."""
        if not self._bases.complete:  # lost, so what they were projected with is lost too
            return
        found = list_files(self.path / "shards")
        for index in range(self.draft.num_shards):
            name = shard_folder(self.path, index).name
            if index not in self._standing and f"{name}/{SHARD}" in found:
                self._note_whole(index, lambda: found, f"{name}/")

    def _note_whole(
        self, index: int, look: Callable[[], Mapping[str, int]], prefix: str = ""
    ) -> None:
        """Note a shard that has its shard.json, if all the files of which it speaks are there."""
        try:
            info, digest = read_shard_hashed(shard_folder(self.path, index))
        except CacheError:  # a damaged one is written again
            return
        found = look()
        if info.projections not in (None, self._bases.digest):
            self._bases.forget()  # and all that was projected with other ones
            self._standing.clear()
            self._bytes = 0
        elif all(found.get(prefix + name) == size for name, (size, _) in info.files.items()):
            self._note(index, info, digest)

    def _note(self, index: int, info: ShardInfo, digest: str) -> None:
        totals = tuple(getattr(info, name) for name in Totals.model_fields)
        self._standing[index] = Standing(digest, totals, info.skipped, info.fidelity)
        self._bytes += info.bytes
        self._skipped += len(info.skipped)
        if info.skipped:
            require_few(self._skipped, self.draft.num_examples, *next(iter(info.skipped.items())))

    def _require_own(self) -> None:
        """Where the draft was lost with a damaged manifest, the shards know it by its digest."""
        names = list_files(self.path / "shards")
        for index in range(self.draft.num_shards):
            folder = shard_folder(self.path, index)
            if f"{folder.name}/{SHARD}" not in names:
                continue
            try:
                found = read_shard(folder).draft
            except CacheError:  # a damaged one will be written
                continue
            if found != self.draft.own_digest:
                raise CacheError(
                    f"{self.path}: has shards but neither {DRAFT} nor {MANIFEST}, and they were"
                    " written for other settings; remove the folder or choose another"
                )

    def _make_manifest(self, shards: str, standing: Sequence["Standing"]) -> Manifest:
        totals = map(sum, zip(*(shard.totals for shard in standing), strict=True))
        skipped: dict[str, str] = {}
        for shard in standing:
            skipped |= shard.skipped
        return Manifest(
            **_dump_draft(self.draft),
            shards=shards,
            projections=_hash(self.path / FILE),
            head=_hash(self.path / output_head.FILE),
            fidelity=dict(standing[0].fidelity),
            totals=Totals(**dict(zip(Totals.model_fields, totals, strict=True))),
            files=sum_files(self.path, *OUTSIDE),
            skipped=skipped,
        )


def _dump_draft(draft: Draft) -> dict[str, Any]:
    """The draft's own fields, of a manifest too."""
    return draft.model_dump(mode="json", include=set(Draft.model_fields))


def _hash(file: Path) -> str | None:
    return hash_file(file) if file.is_file() else None
