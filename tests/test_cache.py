"""What is put on the shelf comes back, to any reader, and wrong examples do not get there."""

import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from cache_examples import (
    SIGNALS,
    assert_same,
    make_draft,
    make_example,
    make_examples,
    write_cache,
)

from pipeline.cache import CODECS, Draft, Signal, TargetsSpec, TeacherCache
from pipeline.cache.codecs import Steps
from pipeline.cache.sizes import column_bytes
from pipeline.errors import CacheError


@pytest.fixture(scope="module")
def draft() -> Draft:
    return make_draft(11, signals=SIGNALS)


@pytest.fixture(scope="module")
def path(draft: Draft, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "small"
    write_cache(path, draft)
    return path


def test_every_example_comes_back(path, draft):
    cache = TeacherCache.open(path)
    assert len(cache) == 11
    for row in (3, 0, 10, 4, -1, -11, 7):
        assert_same(cache[row], make_example(row % 11, draft))
    with pytest.raises(IndexError, match="row 11 of 11"):
        cache[11]


def test_an_id_names_its_example_whatever_the_order(path, draft):
    cache = TeacherCache.open(str(path))
    for row in (9, 2, 10, 2, 0):
        assert_same(cache.by_id(f"text-{row}"), make_example(row, draft))
    assert "text-10" in cache and "text-11" not in cache and 3 not in cache
    assert list(cache.ids()) == [f"text-{row}" for row in range(11)]


def test_splits_are_found_without_their_shards(path):
    cache = TeacherCache.open(path)
    np.testing.assert_array_equal(cache.split_indices("test"), [2, 5, 8])
    np.testing.assert_array_equal(cache.split_indices("train"), [0, 1, 3, 4, 6, 7, 9, 10])
    assert list(cache.ids("test")) == ["text-2", "text-5", "text-8"]


@pytest.mark.parametrize("codec", [*(codec() for codec in CODECS.values()), Steps(levels=90)])
@pytest.mark.parametrize("sizes", [(50, 8, 3), (50, 0, 4), (7, "all", 0), (2**18, 5, 2)], ids=str)
def test_a_cache_describes_itself(tmp_path, codec, sizes):
    classes, top_k, draws = sizes
    spec = TargetsSpec(top_k=top_k, tail_draws=draws, temperatures=(2.0,), codec=codec)
    draft = make_draft(2, num_classes=classes, targets=spec.resolve(classes))
    write_cache(tmp_path, draft)
    cache = TeacherCache.open(tmp_path)
    assert cache.manifest.targets.codec == codec.resolve(draft.layout.top_k)
    assert cache.manifest.targets.temperatures == (1.0, 2.0)
    for row in range(2):
        found, expected = cache[row].targets, make_example(row, draft).targets
        ids, own = expected.ids.sort(dim=1), found.ids.sort(dim=1)
        assert torch.equal(own.values, ids.values)
        for temperature in (1.0, 2.0):
            ours, theirs = found.at(temperature), expected.at(temperature)
            log_probs = theirs.log_probs.gather(1, ids.indices)
            decoded = ours.log_probs.gather(1, own.indices)
            torch.testing.assert_close(decoded, log_probs, atol=1.5, rtol=0)
            torch.testing.assert_close(decoded.exp(), log_probs.exp(), atol=0.02, rtol=0)
            torch.testing.assert_close(ours.tail_mass, theirs.tail_mass, atol=1e-3, rtol=0)


def test_arrow_and_datasets_open_the_rows(path, draft):
    files = sorted(str(file) for file in path.glob("shards/*/rows.arrow"))
    examples = make_examples(draft)
    plain = pa.concat_tables([pa.ipc.open_file(file).read_all() for file in files])
    assert plain["example_id"].to_pylist() == [example.example_id for example in examples]
    assert plain["input_ids"].to_pylist() == [example.input_ids.tolist() for example in examples]
    cache_dir = str(path.parent / "datasets")
    hub = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=cache_dir)
    assert hub[9]["example_id"] == "text-9"
    targets = hub[9]["targets"]
    assert [target["label_id"] for target in targets] == examples[9].label_ids.tolist()
    lse = np.array([target["logsumexp"] for target in targets], dtype=np.float32)
    np.testing.assert_array_equal(lse, examples[9].targets.logsumexp.numpy())


@pytest.mark.parametrize("name", CODECS)
def test_datasets_opens_every_codec(tmp_path, name):
    draft = make_draft(3, targets=TargetsSpec(top_k=4, tail_draws=2, codec=name))
    write_cache(tmp_path / "cache", draft)
    file = str(tmp_path / "cache/shards/00000/rows.arrow")
    hub = datasets.load_dataset(
        "arrow", data_files=file, split="train", cache_dir=str(tmp_path / "datasets")
    )
    columns = draft.targets.codec.columns(draft.layout)
    targets = hub[1]["targets"]
    assert len(targets) == len(make_example(1, draft).target_positions)
    for column, (_, width) in columns.items():
        assert all(np.size(target[column]) == width for target in targets)


def test_zarr_opens_the_hidden_states(path, draft):
    examples = make_examples(draft)[4:8]
    group = zarr.open_group(path / "shards/00001/hidden.zarr", mode="r")
    assert set(group) == set(SIGNALS)
    for name, signal in SIGNALS.items():
        expected = torch.cat([example.hidden[name] for example in examples]).numpy()
        assert group[name].dtype == signal.dtype
        np.testing.assert_array_equal(group[name][:], expected.astype(signal.dtype))


def test_hidden_states_span_chunks_and_files(tmp_path):
    signals = {"layer.0": Signal(width=1024, dtype="float32"), "pooled": SIGNALS["pooled"]}
    draft = make_draft(3, signals=signals, shard_examples=3)
    examples = [make_example(row, draft, tokens) for row, tokens in enumerate((700, 9_000, 40))]
    write_cache(tmp_path, draft, examples)
    assert len(list(tmp_path.glob("shards/00000/hidden.zarr/layer.0/c/*/0"))) == 2
    cache = TeacherCache.open(tmp_path)
    for row in (2, 0, 1):
        for name, values in examples[row].hidden.items():
            assert torch.equal(cache[row].hidden[name], values)


def test_record_batches_stay_small_and_rows_are_found_in_all(tmp_path):
    draft = make_draft(600, shard_examples=600, targets=TargetsSpec(top_k=1))
    write_cache(tmp_path, draft)
    file = pa.ipc.open_file(tmp_path / "shards/00000/rows.arrow")
    assert file.num_record_batches == 3
    cache = TeacherCache.open(tmp_path)
    for row in (599, 0, 255, 256, 511, 512):
        assert cache[row].example_id == f"text-{row}"


def test_values_may_be_absent_in_carried_columns(tmp_path):
    columns = {"split": "string", "rank": "int64", "weight": "float64", "clean": "bool"}
    draft = make_draft(2, columns=columns)
    base = make_examples(make_draft(2))
    carried = [
        {"split": "train", "rank": None, "weight": None, "clean": True},
        {"split": None, "rank": 2**40, "weight": 0.5, "clean": None},
    ]
    examples = [replace(e, columns=c) for e, c in zip(base, carried, strict=True)]
    write_cache(tmp_path, draft, examples)
    cache = TeacherCache.open(tmp_path)
    assert [dict(cache[row].columns) for row in range(2)] == carried
    np.testing.assert_array_equal(cache.split_indices("train"), [0])


def test_an_example_without_targets_is_kept(tmp_path):
    draft = make_draft(2, signals=SIGNALS)
    examples = [make_example(0, draft, tokens=1), make_example(1, draft)]
    write_cache(tmp_path, draft, examples)
    cache = TeacherCache.open(tmp_path)
    for row in range(2):
        assert_same(cache[row], examples[row])


def read_rows(cache: TeacherCache) -> list[str]:
    return [f"{e.example_id} {float(e.hidden['pooled'].sum()):.6f}" for e in cache.stream(0, 0)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_read_reads_on(path, tmp_path):
    """A thread is held inside a read, by a file that gives nothing yet, while the process forks."""
    slow = Path(shutil.copytree(path, tmp_path / "slow"))
    pipe = slow / "shards/00001/shard.json"
    pipe.unlink()
    os.mkfifo(pipe)
    cache = TeacherCache.open(slow)
    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(lambda: cache[4])
        with pipe.open("w"):  # returns once the reader has opened the other end
            child = context.Process(target=lambda: [cache[row] for row in (0, 3, 8)])
            child.start()
            child.join(timeout=300)
            child.kill()
        assert isinstance(held.exception(), CacheError)
    child.join()
    assert child.exitcode == 0


def test_a_pickled_cache_is_its_path(path):
    cache = TeacherCache.open(path)
    expected = read_rows(cache)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 500
    assert read_rows(pickle.loads(pickled)) == expected


def test_a_pickled_example_is_whole_and_needs_no_cache(tmp_path):
    draft = make_draft(3, signals=SIGNALS)
    write_cache(tmp_path / "cache", draft, make_examples(draft))
    example = TeacherCache.open(tmp_path / "cache")[1]
    pickled = pickle.dumps(example)
    (tmp_path / "cache" / "shards").rename(tmp_path / "gone")
    found = pickle.loads(pickled)
    assert_same(found, make_examples(draft)[1])
    assert found.columns == example.columns


def test_threads_read_what_one_thread_reads(path):
    cache = TeacherCache.open(path)
    rows = list(np.random.default_rng(0).integers(0, 11, 200))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: cache[int(row)].example_id, rows))
    assert found == [f"text-{row}" for row in rows]


def test_bytes_by_column_add_up_to_the_files(path, draft):
    (path / "tokenizer").mkdir(exist_ok=True)
    (path / "tokenizer/tokenizer.json").write_text("{}")
    sizes = column_bytes(TeacherCache.open(path))
    assert sum(sizes.values()) == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    names = set(draft.columns) | {"example_id", "input_ids", "logsumexp", "gap_0", "draw_logit_0"}
    assert names <= set(sizes) and all(sizes[name] > 0 for name in names)
    assert {f"hidden {name}" for name in SIGNALS} <= set(sizes)
    assert sizes["(tokenizer)"] == 2


def test_bytes_follow_the_columns_content(tmp_path):
    """4 incompressible bytes for each target's logsumexp, hardly any for positions that repeat."""
    draft = make_draft(40, shard_examples=40, targets=TargetsSpec(top_k=4, codec="lossless"))
    examples = [make_example(row, draft, tokens=101) for row in range(40)]
    write_cache(tmp_path, draft, examples)
    sizes = column_bytes(TeacherCache.open(tmp_path))
    targets = 40 * 100
    assert 3.0 < sizes["logsumexp"] / targets < 4.1
    assert sizes["position"] / targets < 0.5
    assert 4 * 2.5 < sum(sizes[f"logit_{plane}"] for plane in range(4)) / targets < 4 * 4.1


def test_the_readme_says_enough_to_read_the_cache(tmp_path, monkeypatch):
    """The reader on the format's page, as it stands there, finds what ours finds."""
    page = Path(__file__).parent.parent / "data" / "README.md"
    section = page.read_text(encoding="utf-8").split("## Reading it without Stillroom")[1]
    code = section.split("```python\n")[1].split("```")[0]
    draft = make_draft(2, num_classes=3_000, targets=TargetsSpec(top_k=12))
    write_cache(tmp_path, draft)
    monkeypatch.chdir(tmp_path)
    found: dict[str, np.ndarray] = {}
    exec(code, found)
    targets = TeacherCache.open(tmp_path)[0].targets
    np.testing.assert_array_equal(found["ids"], targets.ids.numpy())
    np.testing.assert_allclose(found["logits"], targets.logits.numpy(), rtol=1e-6)
    expected = targets.at(1.0).log_probs.exp().numpy()
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-5)
    schema = found["batch"].schema
    names = [*schema.names[:-2], *found["targets"].type.names]
    assert all(f"`{name}`" in page.read_text(encoding="utf-8") for name in names)


def test_compression_is_a_choice_of_the_cache(tmp_path):
    """Bytes fall from none to lz4 to zstd, the content stays, and only a choice is written down."""
    sizes = []
    for compression in ("none", "lz4", "zstd"):
        path = tmp_path / compression
        spec = TargetsSpec(top_k=40, codec="lossless", compression=compression)
        draft = make_draft(12, targets=spec, num_classes=600)
        sizes.append(write_cache(path, draft).totals.bytes)
        for row, example in enumerate(TeacherCache.open(path).stream(0, 0, shuffle=False)):
            assert_same(example, make_example(row, draft))
        raw = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        assert ("compression" in raw["targets"]) == (compression != "zstd")
    assert sizes == sorted(sizes, reverse=True)
