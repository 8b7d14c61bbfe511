"""Damage, mistaken identity and unknown names: nothing wrong is ever read as right."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_examples import (
    SIGNALS,
    assert_same,
    make_draft,
    make_example,
    make_examples,
    make_targets,
    write_cache,
)

from pipeline.cache import TeacherCache
from pipeline.cache.documents import write_sealed
from pipeline.cache.index.splits import hash_id
from pipeline.errors import CacheError

DRAFT = make_draft(10, signals=SIGNALS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "whole"
    write_cache(path, DRAFT)
    return path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A cache to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_what_is_no_cache_is_told_from_what_is_missing(tmp_path):
    with pytest.raises(CacheError, match="no such folder"):
        TeacherCache.open(tmp_path / "nowhere")
    with pytest.raises(CacheError, match="is no cache"):
        TeacherCache.open(tmp_path)


def change_manifest(path: Path, **changes: object) -> None:
    raw = json.loads((path / "manifest.json").read_text())
    write_sealed(path / "manifest.json", raw | changes)


def test_a_newer_format_is_refused(copy):
    change_manifest(copy, version=2)
    with pytest.raises(CacheError, match="cache format 2, this Stillroom reads up to 1"):
        TeacherCache.open(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "task": 3}', "\x00\xff"])
def test_a_damaged_manifest_is_one_line(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(CacheError, match="cache the teacher again") as caught:
        TeacherCache.open(copy)
    assert "\n" not in str(caught.value) and "manifest.json" in str(caught.value)


def test_a_text_that_is_not_the_targets_own_stops_the_reader(tmp_path):
    draft = make_draft(3, shifted=False)
    examples = make_examples(draft)
    text = (examples[1].input_ids + 1) % 50
    examples[1] = replace(examples[1], input_ids=text)
    write_cache(tmp_path, draft, examples)
    change_manifest(tmp_path, shifted=True)
    cache = TeacherCache.open(tmp_path)
    assert cache[0].example_id == "text-0"
    with pytest.raises(CacheError, match=r"shards/00000: row 1: example 'text-1' has token"):
        cache[1]


def test_targets_without_a_label_are_not_compared_with_the_text(tmp_path):
    draft = make_draft(1)
    example = make_example(0, draft, tokens=5)
    labels = example.label_ids.copy()
    labels[[0, 2]] = -100
    logits = np.random.default_rng(0).normal(size=(4, 50))
    example = replace(example, label_ids=labels, targets=make_targets(logits, labels, draft, 0))
    write_cache(tmp_path, draft, [example])
    assert_same(TeacherCache.open(tmp_path)[0], example)


@pytest.mark.parametrize("name", ["rows.arrow", "hidden.zarr/pooled/c/0/0", "shard.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_damaged_shard_is_named_and_the_others_are_read(copy, name, damage):
    file = copy / "shards/00001" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "gone":
        file.unlink()
    else:
        other = (copy / "shards/00002" / name).read_bytes()
        file.write_bytes(other + b" " * (len(other) == file.stat().st_size))
    cache = TeacherCache.open(copy)
    assert_same(cache[9], make_example(9, DRAFT))
    with pytest.raises(CacheError, match="shards/00001") as caught:
        cache[5]
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_in_rows_is_refused_and_never_believed(copy):
    file = copy / "shards/00001/rows.arrow"
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), 1):
            bad[place] ^= int(rng.integers(1, 256))
        file.write_bytes(bytes(bad))
        cache = TeacherCache.open(copy)
        for row in range(4, 8):
            try:
                assert_same(cache[row], make_example(row, DRAFT))
            except CacheError as error:
                refused += "\n" not in str(error)
            with suppress(CacheError):
                cache.by_id(f"text-{row}")
        with suppress(CacheError):
            list(cache.ids())
    assert refused > 100


def test_damage_is_named_by_record_batch_and_by_chunk(copy):
    file = copy / "shards/00001/rows.arrow"
    info = json.loads((copy / "shards/00001/shard.json").read_text())
    _, start, size, _ = info["batches"][0]
    content = bytearray(file.read_bytes())
    content[start + size // 2] ^= 1
    file.write_bytes(bytes(content))
    vectors = copy / "shards/00000/hidden.zarr/layer.0/c/0/0"
    vectors.write_bytes(bytes(vectors.stat().st_size))
    cache = TeacherCache.open(copy)
    with pytest.raises(
        CacheError, match=r"shards/00001: .*record batch 0 of rows.arrow: .*checksum"
    ):
        cache[4]
    with pytest.raises(CacheError, match=r"shards/00000: .*chunk 0 of layer.0: .*checksum"):
        cache[0].hidden["layer.0"]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_flipped_byte_in_a_vector_is_refused_once_it_is_asked_for(copy, name):
    file = copy / f"shards/00001/hidden.zarr/{name}/c/0/0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(bytes(content))
    example = TeacherCache.open(copy)[4]
    with pytest.raises(CacheError, match="shards/00001: cannot be read"):
        example.hidden[name]
    for other in SIGNALS.keys() - {name}:
        assert torch.equal(example.hidden[other], make_example(4, DRAFT).hidden[other])


def test_hidden_signals_are_a_mapping_that_reads_no_more_than_is_asked(copy):
    for file in copy.glob("shards/00001/hidden.zarr/*/c/0/0"):
        file.write_bytes(bytes(file.stat().st_size))
    hidden = TeacherCache.open(copy)[4].hidden
    assert list(hidden) == sorted(SIGNALS) == sorted(hidden.keys())
    assert (len(hidden), "pooled" in hidden, "layer.7" in hidden) == (3, True, False)
    with pytest.raises(KeyError, match=r"layer\.7"):
        hidden["layer.7"]
    with pytest.raises(CacheError, match="shards/00001"):
        hidden["pooled"]


def test_opening_touches_no_shard(copy):
    shutil.rmtree(copy / "shards")
    cache = TeacherCache.open(copy)
    assert len(cache) == 10
    assert "text-99" not in cache
    np.testing.assert_array_equal(cache.split_indices("test"), [2, 5, 8])
    with pytest.raises(CacheError, match=r"shards/00000/shard.json: cannot be read"):
        cache[0]


def test_few_shards_are_open_at_a_time(tmp_path):
    draft = make_draft(70, shard_examples=1)
    write_cache(tmp_path, draft)
    cache = TeacherCache.open(tmp_path)
    for row in range(70):
        assert cache[row].example_id == f"text-{row}"
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    assert len({line for line in mapped.splitlines() if str(tmp_path) in line}) < 40


def test_ids_of_one_hash_are_told_apart(copy):
    """An index in which every id has the hash of text-6."""
    (copy / "index/id_blocks.arrow").unlink()  # as in caches that were written without it
    change_manifest(copy, files={})
    table = pa.table({"hash": np.full(10, hash_id("text-6"), np.uint64), "row": np.arange(10)})
    with pa.ipc.new_file(copy / "index/ids.arrow", table.schema) as writer:
        writer.write_table(table)
    assert_same(TeacherCache.open(copy).by_id("text-6"), make_example(6, DRAFT))


def test_unknown_ids_and_splits_are_refused(whole, tmp_path):
    cache = TeacherCache.open(whole)
    with pytest.raises(CacheError, match="has no example 'text-10' among its 10"):
        cache.by_id("text-10")
    with pytest.raises(CacheError, match="has no split 'tets'; did you mean 'test'"):
        cache.split_indices("tets")
    bare = make_draft(1, columns={})
    write_cache(tmp_path, bare, [replace(make_example(0, bare), columns={})])
    with pytest.raises(CacheError, match="carries no column 'split'"):
        TeacherCache.open(tmp_path).split_indices("train")


def flip(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


def test_one_flipped_bit_of_the_manifest_is_always_refused(copy):
    file = copy / "manifest.json"
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        flip(file, rng)
        with pytest.raises(CacheError, match=r"manifest\.json"):
            TeacherCache.open(copy)
        file.write_bytes(good)


@pytest.mark.parametrize("damage", [flip, lambda file, _: file.unlink()])
def test_what_stands_beside_the_shards_is_compared_before_it_is_read(copy, damage):
    rng = np.random.default_rng(0)
    columns = sorted((copy / "index/columns").iterdir())
    for file in (copy / "index/split.arrow", *columns):
        damage(file, rng)
    cache = TeacherCache.open(copy)
    assert_same(cache[0], make_example(0, DRAFT))
    with pytest.raises(CacheError, match=r"index/split\.arrow: .*verify --repair"):
        cache.split_indices("train")
    for column in DRAFT.columns:
        with pytest.raises(CacheError, match=r"index/columns/\w+\.arrow: .*verify --repair"):
            cache.group(column)


def test_a_damaged_tokenizer_is_not_handed_out(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text("{}")
    write_cache(tmp_path, make_draft(4))
    assert TeacherCache.open(tmp_path).tokenizer_path == tmp_path / "tokenizer"
    flip(file, np.random.default_rng(0))
    with pytest.raises(CacheError, match=r"tokenizer\.json: fails its checksum"):
        _ = TeacherCache.open(tmp_path).tokenizer_path
