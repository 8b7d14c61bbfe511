"""Numbers that no teacher said, with every checksum mended: refused on read, or told by verify."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from cache_examples import make_draft, make_example, write_cache
from fuzz_mutations import reseal

from pipeline.cache import Signal, TargetsSpec, TeacherCache, VectorType
from pipeline.cache.record_batch import StoredExample, join_targets
from pipeline.cache.verifying.whole import verify_cache
from pipeline.errors import CacheError

TARGET = 5  # of the first record batch
NAN, INFINITY = 0x7FC00000, 0x7F800000


def write(path: Path, codec: str = "lossless") -> Path:
    """A cache whose columns stand in rows.arrow as they are."""
    targets = TargetsSpec(
        top_k=4, tail_draws=2, temperatures=(1.0, 2.0), codec=codec, compression="none"
    )
    write_cache(path, make_draft(6, signals={}, targets=targets, num_classes=300))
    return path


def change(path: Path, column: str, spoil: Callable[[np.ndarray], None]) -> None:
    """Change a column of the first record batch, and mend the checksums."""
    example = TeacherCache.open(path)[0]
    assert isinstance(example, StoredExample)
    values = example.coded.parts[0].columns[column].copy()
    before = values.tobytes()
    spoil(values)
    rows = path / "shards/00000/rows.arrow"
    content = rows.read_bytes()
    assert content.count(before) == 1
    rows.write_bytes(content.replace(before, values.tobytes()))
    reseal(path)


def put_logit(path: Path, prefix: str, bits: int) -> None:
    """Write the four bytes of a float32 where a logit stands."""
    for plane in range(4):

        def put(values: np.ndarray, byte: int = bits >> (8 * plane) & 0xFF) -> None:
            values[TARGET, 1] = byte

        change(path, f"{prefix}logit_{plane}", put)


def find_owner(path: Path) -> tuple[int, str]:
    """The example of the spoilt target, asked before it is spoilt."""
    cache, first = TeacherCache.open(path), 0
    for row in range(len(cache)):
        first += len(cache[row].targets)
        if first > TARGET:
            return row, cache[row].example_id
    raise AssertionError("too few targets")


def require_refused(path: Path, owner: tuple[int, str]) -> None:
    row, name = owner
    cache = TeacherCache.open(path)
    sound = [cache[at] for at in range(len(cache)) if at != row]
    assert join_targets(sound).to("cpu").logits.isfinite().all()
    batch = [cache[at] for at in range(len(cache))]
    found = f"shards/00000: record batch 0 of rows.arrow: example '{name}' has targets that are NaN"
    for read in (
        lambda: cache[row].targets,
        lambda: join_targets(batch),
        lambda: join_targets(batch, late=True),
    ):
        with pytest.raises(CacheError, match=found) as caught:
            read()
        assert "\n" not in str(caught.value)
    report = verify_cache(path)
    assert report.damaged_shards == [0] and f"example '{name}'" in str(report.findings[0])


@pytest.mark.parametrize("prefix", ["", "draw_"])
@pytest.mark.parametrize("bits", [NAN, INFINITY, INFINITY | 1 << 31, 0x7F800001])
def test_a_logit_that_is_no_number_is_refused(tmp_path: Path, prefix: str, bits: int) -> None:
    owner = find_owner(write(tmp_path / "cache"))
    put_logit(tmp_path / "cache", prefix, bits)
    require_refused(tmp_path / "cache", owner)


@pytest.mark.parametrize("column", ["logsumexp", "label_log_prob"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_normaliser_or_label_that_is_no_number_is_refused(
    tmp_path: Path, column: str, value: float
) -> None:
    owner = find_owner(write(tmp_path / "cache"))

    def put(values: np.ndarray) -> None:
        values[TARGET, -1] = value

    change(tmp_path / "cache", column, put)
    require_refused(tmp_path / "cache", owner)


def test_numbers_as_large_as_they_come_are_numbers(tmp_path: Path) -> None:
    row, _ = find_owner(write(tmp_path / "cache"))
    largest = np.finfo(np.float32).max
    put_logit(tmp_path / "cache", "draw_", int(largest.view(np.uint32)))
    assert float(TeacherCache.open(tmp_path / "cache")[row].targets.draw_logits.max()) == largest


def lower(values: np.ndarray) -> None:
    """A normaliser below the logits."""
    values[TARGET, 1] -= 30


def raise_levels(values: np.ndarray) -> None:
    """Several entries of a probability of nearly 1."""
    values[TARGET] = values.max()


@pytest.mark.parametrize(
    ("codec", "column", "spoil", "temperature"),
    [("lossless", "logsumexp", lower, "2"), ("steps", "level_0", raise_levels, "1")],
)
def test_probabilities_of_more_than_1_are_told_by_verify(
    tmp_path: Path, codec: str, column: str, spoil: Callable[[np.ndarray], None], temperature: str
) -> None:
    path = write(tmp_path / "cache", codec)
    _, name = find_owner(path)
    assert verify_cache(path).state == "whole"
    change(path, column, spoil)
    told = [str(finding) for finding in verify_cache(path).findings]
    said = f"example {name!r}: probabilities of kept classes sum to more than 1 at temperature"
    assert f"shards/00000/rows.arrow: {said} {temperature}" in told


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 1e37])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, scale: float) -> None:
    signals = {"layer.0": Signal(width=4, dtype="int8")}
    write_cache(tmp_path, make_draft(6, signals=signals))
    rows = sum(len(TeacherCache.open(tmp_path)[row].hidden["layer.0"]) for row in range(4))
    file = tmp_path / "shards/00000/hidden.zarr/layer.0.scale/c/0/0"
    content = bytearray(file.read_bytes())
    content[4 * rows - 4 : 4 * rows] = np.float32(scale).tobytes()
    content[2048:2052] = google_crc32c.value(bytes(content[:2048])).to_bytes(4, "little")
    file.write_bytes(bytes(content))
    reseal(tmp_path)
    found = (
        rf"chunk 0 of layer\.0: vector {rows - 1} of the shard has the scale .*, expected at most"
    )
    with pytest.raises(CacheError, match=found):
        dict(TeacherCache.open(tmp_path)[0].hidden)
    assert verify_cache(tmp_path).damaged_shards == [0]


def test_the_largest_vectors_of_8_bits_are_numbers(tmp_path: Path) -> None:
    largest = torch.full((1, 4), torch.finfo(torch.float32).max)
    for dtype in ("int8", "float8_e4m3fn"):
        draft = make_draft(1, signals={"pooled": Signal(width=4, dtype=dtype, per="example")})
        example = replace(make_example(0, draft), hidden={"pooled": largest})
        write_cache(tmp_path / dtype, draft, [example])
        assert TeacherCache.open(tmp_path / dtype)[0].hidden["pooled"].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_vector_that_is_no_number_is_told_by_verify(tmp_path: Path, dtype: VectorType) -> None:
    draft = make_draft(1, signals={"pooled": Signal(width=4, dtype=dtype, per="example")})
    write_cache(tmp_path, draft)
    file = tmp_path / "shards/00000/hidden.zarr/pooled/c/0/0"
    content = bytearray(file.read_bytes())
    size = 4 * (4 if dtype == "float32" else 2)  # of the vector; all bits set are NaN
    content[:size] = b"\xff" * size
    chunk = 512 * size
    content[chunk : chunk + 4] = google_crc32c.value(bytes(content[:chunk])).to_bytes(4, "little")
    file.write_bytes(bytes(content))
    reseal(tmp_path)
    report = verify_cache(tmp_path)
    assert report.damaged_shards == [0]
    assert "hidden.zarr/pooled: chunk 0 holds NaN or infinity" in str(report.findings[0])
