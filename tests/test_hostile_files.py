"""Files of a cache made to hurt whoever opens them, every checksum mended: one line, no memory."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from fuzz_mutations import read_files, reseal, write_base

from pipeline.cache import TeacherCache, read_bases
from pipeline.cache.messages import read_buffers, require_bounded
from pipeline.cache.sizes import column_bytes
from pipeline.errors import CacheError
from pipeline.storage import as_path, local_folder, write_bytes

ROWS = "shards/00000/rows.arrow"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("hostile") / "cache"
    write_base(path)
    return path


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def require_refused(path: Path, match: str, row: int = 0) -> None:
    """Mend the checksums and read a row with all its vectors."""
    reseal(path)
    with pytest.raises(CacheError, match=match) as caught:
        dict(TeacherCache.open(path)[row].hidden)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def first_message(content: bytes) -> Any:
    source = pa.BufferReader(content)
    source.seek(8)
    pa.ipc.read_schema(source)
    return pa.ipc.read_message(source)


def test_a_buffer_that_claims_terabytes_is_refused_before_it_is_decompressed(copy: Path) -> None:
    content = bytearray((copy / ROWS).read_bytes())
    message = first_message(bytes(content))
    body = bytes(content).index(message.body.to_pybytes())
    places = read_buffers(message.metadata.to_pybytes()).places
    at = body + next(start for start, size in places if size)
    content[at : at + 8] = (2**42).to_bytes(8, "little")
    (copy / ROWS).write_bytes(bytes(content))
    require_refused(copy, r"record batch 0 of rows.arrow: .* bytes claim to hold 4,398,")
    with pytest.raises(CacheError, match="claim to hold"):
        list(TeacherCache.open(copy).ids())


def test_a_buffer_that_really_expands_to_gigabytes_is_refused() -> None:
    """Six times the same 256 MiB of zeros, in some kilobytes of zstd."""
    zeros = pa.array(np.zeros(2**25))
    batch = pa.record_batch([zeros] * 6, [f"c{i}" for i in range(6)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(batch)
    source = pa.BufferReader(sink.getvalue())
    pa.ipc.read_schema(source)
    message = pa.ipc.read_message(source)
    assert message.body.size < 2**20
    with pytest.raises(ValueError, match="claim to hold 1,610,612,736"):
        require_bounded(message)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))


def spoil_entry(file: Path, entry: int, value: int) -> None:
    """Change where the first chunk begins (0) or its bytes (1), with the CRC mended."""
    content = bytearray(file.read_bytes())
    start = len(content) - 4 - 256 * 16
    content[start + 8 * entry : start + 8 * entry + 8] = struct.pack("<Q", value)
    content[-4:] = struct.pack("<I", google_crc32c.value(bytes(content[start:-4])))
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(("entry", "value"), [(0, 2**63), (0, 10**6), (1, 2**40), (1, 5), (1, 0)])
def test_a_chunk_of_another_place_or_size_is_refused(copy: Path, entry: int, value: int) -> None:
    spoil_entry(copy / "shards/00000/hidden.zarr/layer.0/c/0/0", entry, value)
    require_refused(copy, r"chunk 0 of layer\.0: .* says that a chunk has")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"examples": 10**12}, "examples from row"),
        ({"features": 10**12}, r"claim to hold [\d,]+"),
        ({"index": 1}, "expected shard 0"),
        ({"batches": []}, "record batches of other than"),
        ({"batches": [[4, 2**62, 2**62, 0]]}, "ends after"),
        ({"frequent_ids": "1 " * 10**5}, "more than every class once"),
        ({"frequent_ids": "99999999999999999999"}, "a number of no class"),
        ({"frequent_ids": "1 1"}, "different classes"),
        ({"files": {}}, "rows.arrow"),
    ],
)
def test_a_shard_that_claims_what_it_cannot_hold_is_refused(
    copy: Path, changes: dict[str, Any], match: str
) -> None:
    change_json(copy / "shards/00000/shard.json", **changes)
    require_refused(copy, match)


def write_index(file: Path, compression: str | None = None, **columns: Any) -> None:
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(file), table.schema, options=options) as writer:
        writer.write_table(table)


RUNS = [([0], [10**12]), ([-1], [2]), ([3, 0], [1, 1]), ([0, 0], [2, 2]), ([5], [2]), ([0], [0])]


@pytest.mark.parametrize(("starts", "counts"), RUNS)
def test_runs_that_are_no_rows_of_the_cache_are_refused(
    copy: Path, starts: list[int], counts: list[int]
) -> None:
    names = pa.array(["train"] * len(starts), pa.large_string())
    write_index(copy / "index/split.arrow", split=names, first_row=starts, rows=counts)
    reseal(copy)
    with pytest.raises(CacheError, match="are not ascending rows below 6"):
        TeacherCache.open(copy).split_indices("train")


def test_an_index_that_is_compressed_or_of_other_columns_is_refused(copy: Path) -> None:
    names, numbers = pa.array(["train"], pa.large_string()), np.array([0])
    for columns, match in (
        ({"split": names, "first_row": numbers, "rows": numbers, "more": numbers}, "columns"),
        ({"split": names, "first_row": pa.array([None], pa.int64()), "rows": numbers}, "nulls"),
        ({"split": pa.array(["train"]), "first_row": numbers, "rows": numbers}, "columns"),
    ):
        write_index(copy / "index/split.arrow", **columns)
        reseal(copy)
        with pytest.raises(CacheError, match=f"split.arrow: cannot be read .*{match}"):
            TeacherCache.open(copy).split_indices("train")
    runs = {"first_row": np.zeros(10**5, int), "rows": np.ones(10**5, int)}
    write_index(
        copy / "index/split.arrow",
        "zstd",
        split=pa.array(["train"] * 10**5, pa.large_string()),
        **runs,
    )
    reseal(copy)
    with pytest.raises(CacheError, match="it is compressed"):
        TeacherCache.open(copy).split_indices("train")


def test_an_id_that_leads_out_of_the_cache_is_refused(copy: Path) -> None:
    content = (copy / "index/ids.arrow").read_bytes()
    hashes = pa.ipc.open_file(pa.BufferReader(content)).read_all()["hash"]
    (copy / "index/id_blocks.arrow").unlink(missing_ok=True)
    rows = np.full(len(hashes), 10**12)
    write_index(copy / "index/ids.arrow", hash=hashes.to_numpy(), row=rows)
    raw = json.loads((copy / "manifest.json").read_text())
    raw["files"].pop("index/id_blocks.arrow", None)
    (copy / "manifest.json").write_text(json.dumps(raw))
    reseal(copy)
    with pytest.raises(CacheError, match="names row 1000000000000"):
        TeacherCache.open(copy).by_id("text-1")


@pytest.mark.parametrize("name", [ROWS, "shards/00000/hidden.zarr/layer.0/c/0/0", "shards/00000"])
def test_a_link_out_of_a_cache_is_not_followed(copy: Path, tmp_path: Path, name: str) -> None:
    elsewhere = (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(CacheError, match="is a link that leads out of the cache"):
        dict(TeacherCache.open(copy)[0].hidden)


@pytest.mark.parametrize("name", ["tokenizer", "index/split.arrow", "projections.safetensors"])
def test_nor_is_one_beside_its_shards(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / "tokenizer").mkdir(exist_ok=True)
    elsewhere = (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(CacheError, match="is a link that leads out of the cache"):
        TeacherCache.open(copy)


@pytest.mark.parametrize("name", ["projections.safetensors", "head.safetensors"])
@pytest.mark.parametrize("header", [b"{}", b"[" * 10**5, b'{"weight":{}}', b"\xff", b""])
def test_safetensors_that_make_no_sense_are_refused(copy: Path, name: str, header: bytes) -> None:
    for length in (len(header), 2**63, 10**8):
        (copy / name).write_bytes(struct.pack("<Q", length) + header)
        reseal(copy)
        cache = TeacherCache.open(copy)
        if name == "head.safetensors":
            with pytest.raises(CacheError, match=r"head\.safetensors: cannot be read"):
                cache.read_head()
        elif length != len(header) or header != b"{}":
            with pytest.raises(CacheError, match=r"projections\.safetensors: cannot be read"):
                read_bases(copy, cache.manifest.projections or "")


def test_a_cut_rows_file_cannot_stop_the_sizes_but_by_one_line(copy: Path) -> None:
    (copy / ROWS).write_bytes((copy / ROWS).read_bytes()[:100])
    reseal(copy)
    with pytest.raises(CacheError, match=r"rows\.arrow: cannot be read"):
        column_bytes(TeacherCache.open(copy))


def test_a_whole_cache_is_read_as_it_was(base: Path, copy: Path) -> None:
    reseal(copy)
    assert read_files(copy) == read_files(base)
    for row in range(len(TeacherCache.open(copy))):
        assert dict(TeacherCache.open(copy)[row].hidden)


@pytest.mark.parametrize("name", ["../../evil", "a/../../../evil", "/etc/evil", "a\\..\\evil"])
def test_a_store_whose_keys_climb_is_copied_nowhere(name: str) -> None:
    folder = as_path("memory://hostile-keys/tokenizer")
    write_bytes(folder / "tokenizer.json", b"{}")
    store = fsspec.filesystem("memory").store
    store[f"/hostile-keys/tokenizer/{name}"] = store["/hostile-keys/tokenizer/tokenizer.json"]
    try:
        with pytest.raises(CacheError, match="which leads out of it"):
            local_folder(folder)
    finally:
        for key in [key for key in store if key.startswith("/hostile-keys")]:
            del store[key]
