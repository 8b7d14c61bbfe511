"""What is damaged is written again, and nothing else is touched.

    where the shards are sound: the index made anew -> whole
    else: draft.json -> shard.json of the damaged removed -> manifest.json removed -> unfinished

In this order, so that whoever is killed in between leaves a cache that is damaged as before, or one
that is not finished: `verify --repair` mends the first, `cache-teacher` continues the second.
"""

from pathlib import Path

from pipeline.cache.checksums import sum_files
from pipeline.cache.documents import read_json, write_sealed
from pipeline.cache.index.making import write_index
from pipeline.cache.manifest import DRAFT, MANIFEST, Draft, Manifest, read_manifest, write_manifest
from pipeline.cache.shards import SHARD, shard_folder
from pipeline.cache.signals.projection import FILE as PROJECTIONS_FILE
from pipeline.cache.verifying.beside import CAPTURE, CONFIG, SETTINGS
from pipeline.cache.verifying.findings import Report
from pipeline.cache.writer import OUTSIDE
from pipeline.storage import remove_file, remove_tree, sync_folder, sync_tree

_INDEX = "index"


def repair_cache(path: Path, report: Report) -> list[str]:
    """Mend what a report of `verify_cache` found, and tell what was done, a line each.

    Raises:
        CacheError: the disk refused, or the cache changed in the meantime.
    """
    told = []
    for orphan in report.orphans:
        _remove(path / orphan.file)
        told.append(f"{orphan.file}: removed")
    lost = {finding.file for finding in report.harm if finding.shard is None}
    for name in sorted({CAPTURE, CONFIG, SETTINGS} & lost):
        lost.discard(name)
        _remove(path / name)
        if name == SETTINGS:
            _forget(path, name)
        told.append(f"{name}: given up, the numbers do not need it")
    for duplicate in (finding for finding in report.harm if finding.kind == "duplicate"):
        lost.discard(duplicate.file)
        told.append(f"{duplicate}; this cannot be mended, cache the teacher again without it")
    if report.damaged_shards or any(name.partition("/")[0] != _INDEX for name in lost):
        told += _unfinish(path, report.damaged_shards, lost)
    elif lost:
        _index_anew(path, read_manifest(path))
        told.append("index: made anew from the shards, which are sound")
    return told


def _unfinish(path: Path, shards: list[int], lost: set[str]) -> list[str]:
    told = [f"{shard_folder(path, index).relative_to(path)}: queued again" for index in shards]
    if (path / MANIFEST).is_file() and MANIFEST not in lost:
        manifest = read_manifest(path)
        draft = manifest.model_dump(mode="json", include=set(Draft.model_fields))
        write_sealed(path / DRAFT, draft)
    for index in shards:
        folder = shard_folder(path, index)
        remove_file(folder / SHARD)
        if folder.is_dir():
            sync_folder(folder)
    if PROJECTIONS_FILE in lost:
        remove_file(path / PROJECTIONS_FILE)
        told.append(f"{PROJECTIONS_FILE}: lost, and with it every shard: all are queued again")
    others = sorted(lost - {PROJECTIONS_FILE, MANIFEST, DRAFT})
    told += [f"{name}: is written anew when the cache is finished" for name in others]
    for name in (MANIFEST, *({DRAFT} & lost)):
        remove_file(path / name)
        if name in lost:
            told.append(f"{name}: removed, its shards are known by themselves")
    sync_folder(path)
    return told


def _index_anew(path: Path, manifest: Manifest) -> None:
    shards = write_index(path, manifest, path)
    sync_tree(path / _INDEX)
    files = sum_files(path, *OUTSIDE) if manifest.files else {}
    if (shards, files) != (manifest.shards, manifest.files):
        # The same table may be other bytes where another version of Arrow writes it.
        write_manifest(path, manifest.model_copy(update={"shards": shards, "files": files}))
        sync_folder(path)


def _forget(path: Path, name: str) -> None:
    """Take a file off the list in capture.json."""
    log = read_json(path / CAPTURE)
    files = {key: facts for key, facts in log["files"].items() if key != name}
    write_sealed(path / CAPTURE, {**log, "files": files})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        remove_file(path)
