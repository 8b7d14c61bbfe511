"""Caches as strangers may have made them: files changed at random, checksums mended or not.

    write_base -> files -- mutate(files, random) --> changed files -- reseal --> checksums that fit

Every choice hangs on the generator, so that a seed and a number name an input.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import pyarrow as pa
import torch
from cache_examples import SIGNALS, make_draft, make_examples, write_cache

from pipeline.cache import Signal, TargetsSpec
from pipeline.cache.documents import SEAL, write_sealed
from pipeline.cache.index.splits import write_shards
from pipeline.cache.output_head import write_head
from pipeline.heads import OutputHead

Files = dict[str, bytes]

NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 511, 512, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**12, 10**30, -(2**31)]
NUMBERS += [-(2**63), -100, -101]
TEXTS = ["", "x", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "\u202e", "<script>", "é" * 300]
TEXTS += ["../view", "..", ".", "../cache/../cache", "memory://none", "file:///", "../cache/"]
TEXTS += ["rows.arrow", "hidden.zarr", "9" * 400, "1 2 3", "0 0", "-1", "pca", "int8", "none"]


def write_base(path: Path) -> None:
    """A small cache with everything that a cache may hold."""
    projected = Signal(
        width=2, dtype="int8", projection={"name": "pca", "width": 2}, source_width=5
    )
    draft = make_draft(
        6,
        signals={**SIGNALS, "layer.1": projected, "layer.2": Signal(width=3, dtype="bfloat16")},
        targets=TargetsSpec(top_k=4, tail_draws=2, temperatures=(1.0, 2.0), codec="steps"),
        num_classes=300,
    )
    generator = torch.Generator().manual_seed(0)
    path.mkdir(parents=True, exist_ok=True)
    head = OutputHead(
        torch.randn(300, 4, generator=generator), torch.zeros(300), 1.0, None, 300, None
    )
    write_head(path, head)
    write_cache(path, draft, make_examples(draft))


def read_files(path: Path) -> Files:
    """Every file of a cache but those that nobody reads."""
    found = sorted(file for file in path.rglob("*") if file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in found}
    return {name: file.read_bytes() for name, file in names.items() if "locks" not in name}


def mutate(files: Files, random: Random) -> Files:
    """One to three files changed, by name."""
    changed: Files = {}
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        name = random.choice(sorted(files))
        content = changed.get(name, files[name])
        changed[name] = _pick(name, random)(content, random)
    return changed


def _pick(name: str, random: Random) -> Callable[[bytes, Random], bytes]:
    if random.random() < 0.3:
        return change_bytes
    if name.endswith(".json"):
        return change_json
    if name.endswith(".safetensors"):
        return change_header
    if "/c/" in name:
        return change_chunk_index
    if name.endswith("rows.arrow"):
        return random.choice([change_words, change_columns])
    return change_words


def change_bytes(content: bytes, random: Random) -> bytes:
    """Bits flipped, bytes cut off, put in or repeated."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random.randrange(256)
        elif kind == 2:
            del data[at : at + random.choice([1, 4, 8, 64, 10**6])]
        elif kind == 3:
            data[at:at] = random.randbytes(random.choice([1, 4, 8, 64]))
        else:
            data[at:at] = data[at : at + random.choice([8, 64])]
    return bytes(data)


def change_words(content: bytes, random: Random) -> bytes:
    """Numbers of four or eight bytes, where they may stand, set to ones that hurt."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4])):
        size = random.choice([2, 4, 8])
        if len(data) > size:
            at = random.randrange(0, len(data) - size, 2)
            value = random.choice(NUMBERS) % 256**size
            data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data)


def change_json(content: bytes, random: Random) -> bytes:
    """A value replaced, dropped, repeated or nested, anywhere in the document."""
    try:
        raw = json.loads(content)
    except ValueError:
        return change_bytes(content, random)
    for _ in range(random.choice([1, 1, 2, 4])):
        places = list(_places(raw))
        if not places:
            break
        node, key = random.choice(places)
        if random.random() < 0.2:
            del node[key]
        elif random.random() < 0.1 and isinstance(node, dict):
            node[random.choice(TEXTS)] = node.pop(key)
        else:
            node[key] = make_value(random, node[key])
    return json.dumps(raw, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(node: Any) -> Any:
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in list(pairs):
        yield node, key
        if isinstance(child, dict | list):
            yield from _places(child)


def make_value(random: Random, old: Any) -> Any:
    """A value of the same or of another kind."""
    if isinstance(old, int) and not isinstance(old, bool) and random.random() < 0.7:
        return random.choice([random.choice(NUMBERS), old + 1, old - 1, old * 2])
    if isinstance(old, list) and old and random.random() < 0.5:
        return random.choice([old * 2, old[:-1], old[::-1], old * 1000])
    nested: Any = 1
    for _ in range(random.choice([2, 40])):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    plain = [None, True, False, 1.5, float("nan"), float("inf"), [], {}, [None], {"digest": "x"}]
    return random.choice([*plain, nested, random.choice(TEXTS), random.choice(NUMBERS), "\ud800"])


def change_header(content: bytes, random: Random) -> bytes:
    """The JSON header of a safetensors file, with its length mended."""
    size = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + size], random)
    length = len(header) if random.random() < 0.8 else random.choice(NUMBERS) % 2**64
    return length.to_bytes(8, "little") + header + content[8 + size :]


def change_chunk_index(content: bytes, random: Random) -> bytes:
    """Where chunks of a Zarr file begin and end, or what they hold, with CRCs mended."""
    data = bytearray(content)
    chunks = 256 if len(data) > 256 * 16 + 4 else 1
    start = len(data) - 4 - 16 * chunks
    if start < 0:
        return change_bytes(content, random)
    if random.random() < 0.7:
        for _ in range(random.choice([1, 2])):
            at = start + 8 * random.choice([0, 1, 2, 3, random.randrange(2 * chunks)])
            value = random.choice([*NUMBERS, start, start - 8, len(data)])
            data[at : at + 8] = (value % 2**64).to_bytes(8, "little")
        data[-4:] = _crc(data[start:-4])
    elif start > 8:
        at = random.randrange(start - 4)
        data[at] ^= 255
        data[start - 4 : start] = _crc(data[: start - 4])
    return bytes(data)


def _crc(content: bytes | bytearray) -> bytes:
    return int(google_crc32c.value(bytes(content))).to_bytes(4, "little")


def change_columns(content: bytes, random: Random) -> bytes:
    """The record batches written again by Arrow, with numbers of some column that are no places."""
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        arrays = [_spoil(column.combine_chunks(), random) for column in table.columns]
        batch = pa.RecordBatch.from_arrays(arrays, schema=table.schema)
    except (pa.ArrowException, OSError, ValueError, TypeError):
        return change_words(content, random)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=random.choice(["zstd", "lz4", None]))
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _spoil(array: Any, random: Random) -> Any:
    """The same array with one of its buffers changed, whatever that comes to."""
    if random.random() < 0.6:
        return array
    buffers = [None if b is None else bytearray(b.to_pybytes()) for b in array.buffers()]
    known = [i for i, buffer in enumerate(buffers) if buffer]
    if not known:
        return array
    index = random.choice(known)
    spoilt = buffers[index]
    assert spoilt is not None
    buffers[index] = bytearray(change_words(bytes(spoilt), random))
    wrapped = [None if b is None else pa.py_buffer(bytes(b)) for b in buffers]
    if pa.types.is_nested(array.type):
        flat = array.flatten() if pa.types.is_large_list(array.type) else array
        if pa.types.is_struct(flat.type):
            return array
        inner = pa.Array.from_buffers(flat.type, len(flat), [None, wrapped[-1]])
        return pa.LargeListArray.from_arrays(
            pa.Array.from_buffers(pa.int64(), len(array) + 1, [None, wrapped[1]]),
            inner,
            type=array.type,
        )
    return pa.Array.from_buffers(array.type, len(array), wrapped)


def reseal(path: Path) -> None:
    """Mend every checksum of a cache, as whoever changed it on purpose would."""
    folders = sorted((path / "shards").iterdir())
    for folder in folders:
        _mend_document(folder / "shard.json", lambda raw, folder=folder: _mend_shard(raw, folder))
    digests = [hashlib.sha256(_read(folder / "shard.json")).hexdigest() for folder in folders]
    own = write_shards(path, digests)
    _mend_document(path / "manifest.json", lambda raw: _mend_manifest(raw, path, own))


def _mend_document(file: Path, mend: Callable[[Any], None]) -> None:
    try:
        raw = json.loads(_read(file))
        mend(raw)
        raw.pop(SEAL, None)
        write_sealed(file, raw)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return  # no document any more, or names that no file has


def _mend_shard(raw: Any, folder: Path) -> None:
    for name in raw.get("files", {}):
        if (folder / name).is_file():
            raw["files"][name] = _sum(folder / name)
    rows = _read(folder / "rows.arrow")
    for batch in raw.get("batches", []):
        start, size = batch[1], batch[2]
        if 0 <= start <= len(rows) and size >= 0:
            if start + size > len(rows):
                batch[2] = size = len(rows) - start
            batch[3] = int(google_crc32c.value(rows[start : start + size]))


def _mend_manifest(raw: Any, path: Path, shards: str) -> None:
    raw["shards"] = shards
    for key, name in (("projections", "projections.safetensors"), ("head", "head.safetensors")):
        if key in raw and (path / name).is_file():
            raw[key] = _sum(path / name)[1]
    for name in raw.get("files", {}):
        if (path / name).is_file():
            raw["files"][name] = _sum(path / name)


def _sum(file: Path) -> tuple[int, str]:
    content = _read(file)
    return len(content), hashlib.sha256(content).hexdigest()


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""
