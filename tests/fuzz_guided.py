"""Bytes into each parser of a cache, led by what of our code they reach (atheris, libFuzzer).

    python tests/fuzz_guided.py --seconds 600 --seed 1

first byte -> parser, the rest -> its bytes; an input is refused by a StillroomError, or by one of
the errors that the readers turn into one, or read within bounds
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import pyarrow as pa

with atheris.instrument_imports(include=["pipeline.cache"]):
    from fuzz import limit_memory
    from fuzz_mutations import read_files, write_base
    from fuzz_views import VIEW, seal_view, write_view_base

    from pipeline.cache.codecs.ranking import Ranking
    from pipeline.cache.documents import SEAL, write_sealed
    from pipeline.cache.index.groups import read_groups
    from pipeline.cache.index.ids import IdIndex
    from pipeline.cache.index.splits import RowRuns, read_table, require_runs
    from pipeline.cache.manifest import Draft, read_draft, read_manifest, read_shard
    from pipeline.cache.messages import BROKEN, read_plain
    from pipeline.cache.output_head import read_head
    from pipeline.cache.reader import TeacherCache
    from pipeline.cache.record_batch import Batch
    from pipeline.cache.rows import decode_batch, decode_columns, make_schema, target_columns
    from pipeline.cache.signals.chunks import ChunkReader
    from pipeline.cache.signals.projection import read_bases
    from pipeline.cache.signals.spec import list_arrays
    from pipeline.cache.views.file import read_runs, read_view_file

from pipeline.errors import StillroomError
from pipeline.storage import hash_file


class Parsers:
    """The parsers, each given some bytes as its whole file."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        write_base(self.base)
        self.files = read_files(self.base)
        self.folder = folder / "one"
        self.views = folder / "views"
        write_view_base(self.views)
        self.view = (self.views / VIEW / "view.json").read_bytes()
        self.runs = next((self.views / VIEW / "rows").iterdir()).read_bytes()
        self.manifest = read_manifest(self.base)
        self.schema = make_schema(self.manifest)
        self.ranking = Ranking(np.zeros(0, np.int32), self.manifest.num_classes)
        self.all: list[tuple[str, Callable[[bytes], None]]] = [
            ("manifest.json", self.read_manifest),
            ("shards/00000/shard.json", self.read_shard),
            ("shards/00000/rows.arrow", self.read_rows),
            ("index/ids.arrow", self.read_ids),
            ("index/split.arrow", self.read_split),
            (next(n for n in self.files if n.startswith("index/columns/")), self.read_groups),
            ("shards/00000/hidden.zarr/layer.0/c/0/0", self.read_chunks),
            ("projections.safetensors", self.read_bases),
            ("head.safetensors", self.read_head),
            ("draft.json", self.read_draft),
            ("view.json", self.read_view),
            ("view/view.json", self.open_view),
            ("view/rows", self.read_runs),
        ]

    def _write(self, name: str, content: bytes) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def _seal(self, name: str, content: bytes) -> None:
        """Write a document with its checksum mended; what is none stays as it is."""
        file = self._write(name, content)
        try:
            raw = json.loads(content)
            raw.pop(SEAL, None)
            write_sealed(file, raw)
        except (ValueError, AttributeError, TypeError, RecursionError):
            return

    def read_draft(self, content: bytes) -> None:
        """JSON to a draft, every key of it."""
        self._seal("draft.json", content)
        assert make_schema(read_draft(self.folder))

    def read_view(self, content: bytes) -> None:
        """JSON to what a view says."""
        self._seal("view.json", content)
        assert len(read_view_file(self.folder).digest) == 64

    def open_view(self, content: bytes) -> None:
        """JSON to a view of caches that stand, and its rows."""
        file = self.views / VIEW / "view.json"
        file.write_bytes(content)
        seal_view(file)
        view = TeacherCache.open(file.parent)
        for row in range(min(len(view), 5)):
            found = view[row]
            assert len(found.targets) == len(found.target_positions)
        assert len(view.skipped) == 0 and len(list(view.ids())) == len(view)

    def read_runs(self, content: bytes) -> None:
        """The rows that a view takes of a cache."""
        digest = hashlib.sha256(content).hexdigest()
        file = self._write(f"rows/{digest}.arrow", content)
        try:
            assert 0 <= len(read_runs(self.folder, digest, 6)) <= 6
        finally:
            file.unlink()

    def read_manifest(self, content: bytes) -> None:
        """JSON to a manifest."""
        self._seal("manifest.json", content)
        manifest = read_manifest(self.folder)
        assert len(manifest.digest) == 64 and make_schema(manifest)

    def read_shard(self, content: bytes) -> None:
        """JSON to what a shard says."""
        self._seal("shard.json", content)
        info = read_shard(self.folder)
        assert info.bytes >= 0
        Ranking.parse(info.frequent_ids, 300)

    def read_rows(self, content: bytes) -> None:
        """A record batch: metadata, body, examples."""
        buffer = pa.py_buffer(content)
        batch = decode_batch(buffer, self.schema)
        kinds = target_columns(self.manifest)
        read = Batch(batch, self.manifest, kinds, self.ranking)
        for row in range(min(batch.num_rows, 20)):
            targets = read.example(row, {}).targets
            assert not targets.ids.numel() or int(targets.ids.min()) >= 0
            assert not targets.ids.numel() or int(targets.ids.max()) < 300
        decode_columns(buffer, self.schema, ["example_id"])

    def read_ids(self, content: bytes) -> None:
        """Index of ids, without its blocks."""
        self._write("index/ids.arrow", content)
        IdIndex(self.folder).find("text-1")

    def read_split(self, content: bytes) -> None:
        """Index of splits."""
        file = self._write("index/split.arrow", content)
        kinds = {"split": pa.large_string(), "first_row": pa.int64(), "rows": pa.int64()}
        table = read_table(file, kinds)
        runs = RowRuns(table["first_row"].to_numpy(), table["rows"].to_numpy())
        assert len(require_runs(runs, 6, file)) <= 6

    def read_groups(self, content: bytes) -> None:
        """Index of a column."""
        self._write(next(n for n in self.files if n.startswith("index/columns/")), content)
        for name in ("split", "weight"):
            read_groups(self.folder, name)
        read_plain(pa.py_buffer(content))

    def read_chunks(self, content: bytes) -> None:
        """A file of Zarr chunks."""
        name = "layer.0/c/0/0"
        self._write(name, content)
        kinds = list_arrays(self.manifest.signals)
        chunks = ChunkReader(self.folder, kinds, {name: (len(content), "")})
        for block in (0, 1, 255):
            assert chunks.read("layer.0", block).shape == (512, 4)

    def read_bases(self, content: bytes) -> None:
        """Safetensors of projections."""
        file = self._write("projections.safetensors", content)
        for basis in read_bases(self.folder, hash_file(file)).values():
            assert basis.components.ndim == 2

    def read_head(self, content: bytes) -> None:
        """Safetensors of an output head."""
        file = self._write("head.safetensors", content)
        assert read_head(self.folder, hash_file(file)).weight.ndim == 2

    def seeds(self) -> list[bytes]:
        """The files of the base, each behind the number of its parser."""
        rows = "shards/00000/rows.arrow"
        info = json.loads(self.files["shards/00000/shard.json"])
        _, start, size, _ = info["batches"][0]
        source = {"path": "../base", "digest": "0" * 64, "rows": "1" * 64}
        view = {"version": 1, "parts": [{**source, "overlays": [{**source, "targets": True}]}]}
        draft = json.loads(self.files["manifest.json"])
        draft = {key: value for key, value in draft.items() if key in Draft.model_fields}
        made = {"draft.json": json.dumps(draft).encode(), "view.json": json.dumps(view).encode()}
        made |= {"view/view.json": self.view, "view/rows": self.runs}
        contents = {name: made.get(name, self.files.get(name, b"")) for name, _ in self.all}
        contents[rows] = contents[rows][start : start + size]
        return [bytes([i]) + contents[name] for i, (name, _) in enumerate(self.all)]


def run_guided(seed: int, seconds: float, inputs: int) -> None:
    """Let libFuzzer try inputs, and print what came of them as JSON."""
    folder = Path(tempfile.mkdtemp())
    parsers = Parsers(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(parsers.seeds()):
        (corpus / str(number)).write_bytes(content)
        parsers.all[number][1](content[1:])
    counts: dict[str, Any] = {"tried": 0, "refused": 0, "read": 0}
    ends = time.monotonic() + seconds

    def try_one(content: bytes) -> None:
        if time.monotonic() > ends or counts["tried"] >= inputs:
            shutil.rmtree(folder)
            print(json.dumps(counts), flush=True)
            os._exit(0)
        counts["tried"] += 1
        _, parse = parsers.all[content[0] % len(parsers.all) if content else 0]
        try:
            parse(content[1:])
            counts["read"] += 1
        except StillroomError as error:
            assert "\n" not in str(error), str(error)
            counts["refused"] += 1
        except BROKEN:
            counts["refused"] += 1

    limit_memory()
    options = [f"-seed={seed + 1}", "-max_len=20000", "-timeout=60", "-rss_limit_mb=0"]
    options.append(f"-artifact_prefix={folder}/")
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], try_one)
    atheris.Fuzz()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run_guided(asked.seed, asked.seconds, asked.inputs)


if __name__ == "__main__":
    main()
