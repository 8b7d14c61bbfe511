"""A view reads as the caches that it speaks of, in whatever way an example is asked for."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_examples import SIGNALS, assert_same, make_draft, make_example, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.batches import Collator, Selection
from pipeline.cache import (
    CacheView,
    Draft,
    Overlay,
    RowRuns,
    Signal,
    TargetsSpec,
    TeacherCache,
    all_rows,
    list_parts,
    list_sources,
    select_rows,
    write_view,
)
from pipeline.cache.documents import write_sealed
from pipeline.cache.sizes import column_bytes
from pipeline.cache.views.file import write_runs
from pipeline.errors import CacheError, MismatchError
from pipeline.storage import as_path, writing_folder
from pipeline.tasks.causal_lm import CausalLM
from stages.cli import app

ROWS = 23


@pytest.fixture(scope="module")
def draft() -> Draft:
    return make_draft(ROWS, signals=SIGNALS)


@pytest.fixture(scope="module")
def cache(draft: Draft, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("caches") / "whole"
    write_cache(path, draft)
    return TeacherCache.open(path)


def make_view(cache: TeacherCache, path: Path, rows: list[int]) -> TeacherCache:
    write_view(path, select_rows(cache, RowRuns.of(np.array(rows))))
    return TeacherCache.open(path)


def assert_reads(view: TeacherCache, cache: TeacherCache, rows: list[int]) -> None:
    """Every public way to an example, against that of the rows of the cache."""
    assert len(view) == len(rows)
    for at, row in enumerate(rows):
        assert_same(view[at], cache[row])
        assert_same(view.by_id(cache[row].example_id), cache[row])
    ids = [cache[row].example_id for row in rows]
    assert list(view.ids()) == ids
    left = next((i for i in cache.ids() if i not in ids), "text-no")
    assert left not in view and view.find_row(left) is None
    splits = [cache[row].columns["split"] for row in rows]
    assert {name: found.tolist() for name, found in view.group("split").items()} == {
        name: [at for at, split in enumerate(splits) if split == name]
        for name in sorted(set(splits))
    }
    for name in set(splits):
        assert view.split_indices(name).tolist() == view.group("split")[name].tolist()
        assert list(view.ids(name)) == [i for i, s in zip(ids, splits, strict=True) if s == name]
    np.testing.assert_array_equal(view.contents, cache.contents[rows])


rows_of = st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True).map(sorted)


@settings(max_examples=25, deadline=None)
@given(rows=rows_of)
def test_a_view_of_rows_reads_as_these_rows(cache, tmp_path_factory, rows):
    view = make_view(cache, tmp_path_factory.mktemp("views") / "some", rows)
    assert_reads(view, cache, rows)


@settings(max_examples=15, deadline=None)
@given(rows=rows_of, data=st.data())
def test_a_view_of_a_view_speaks_of_the_cache_below(cache, tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("views")
    first = make_view(cache, folder / "first", rows)
    places = st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True).map(sorted)
    chosen = data.draw(places)
    second = make_view(first, folder / "second", chosen)
    shutil.rmtree(first.path)
    assert_reads(second, cache, [rows[place] for place in chosen])


def test_an_epoch_of_a_view_is_that_of_a_cache_with_the_same_rows(cache, draft, tmp_path):
    rows = [row for row in range(ROWS) if row % 3 != 1]
    examples = [make_example(row, draft) for row in rows]
    write_cache(tmp_path / "copied", make_draft(len(rows), signals=SIGNALS), examples)
    copied = TeacherCache.open(tmp_path / "copied")
    view = make_view(cache, tmp_path / "view", rows)
    ours, theirs = (list(c.stream(5, 2, rank=1, world_size=2)) for c in (view, copied))
    assert [e.example_id for e in ours] == [e.example_id for e in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)
    chosen = view.split_indices("train")
    assert {e.example_id for e in view.stream(1, 0, indices=chosen)} == set(view.ids("train"))


def test_a_batch_of_several_caches_is_decoded_as_one(cache, draft, tmp_path):
    later = [replace(make_example(row, draft), example_id=f"later-{row}") for row in range(30, 37)]
    write_cache(tmp_path / "later", make_draft(7, signals=SIGNALS, shard_examples=3), later)
    other = TeacherCache.open(tmp_path / "later")
    view = write_view(
        tmp_path / "both", [*select_rows(cache, RowRuns.of(np.arange(4, 9))), *list_parts(other)]
    )
    assert len(view) == 12 and view.manifest.totals.examples == 12
    signals = {"layer.-1": "layer.-1", "pooled": "pooled"}
    collate = Collator(CausalLM(block_size=16), 0, signals, decode_late=True)
    examples = [view[row] for row in (11, 0, 7, 3)]
    found = collate(examples)
    targets = found["targets"].to("cpu")
    expected = torch.cat([example.targets.logits for example in examples])
    assert torch.equal(targets.logits, expected)
    assert torch.equal(found["hidden"]["pooled"], torch.cat([e.hidden["pooled"] for e in examples]))


def _read_in_child(view: TeacherCache, row: int) -> str:
    return view[row].example_id


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_view_is_handed_to_other_processes(cache, tmp_path):
    view = make_view(cache, tmp_path / "view", [2, 3, 9])
    view[1]
    assert isinstance(pickle.loads(pickle.dumps(view)), CacheView)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_in_child, (view, 2)) == "text-9"
    selection = Selection(view, view.split_indices("train"))
    loader = torch.utils.data.DataLoader(
        selection, num_workers=2, collate_fn=lambda e: e[0].example_id
    )
    assert list(loader) == ["text-3", "text-9"]


def test_a_view_moves_with_its_caches(cache, tmp_path):
    shutil.copytree(cache.path, tmp_path / "here" / "cache")
    view = make_view(
        TeacherCache.open(tmp_path / "here" / "cache"), tmp_path / "here" / "view", [1, 4]
    )
    digest = view.manifest.digest
    (tmp_path / "here").rename(tmp_path / "there")
    moved = TeacherCache.open(tmp_path / "there" / "view")
    assert moved.manifest.digest == digest
    assert_same(moved[1], cache[4])


def test_what_a_view_is_made_of_decides_its_digest(cache, tmp_path):
    found = [
        make_view(cache, tmp_path / str(at), rows).manifest
        for at, rows in enumerate(([1, 2], [1, 3], [1, 2], list(range(ROWS))))
    ]
    assert found[0].digest == found[2].digest
    assert len({m.digest for m in (*found, cache.manifest)}) == 4
    assert found[3].totals == cache.manifest.totals


def test_a_view_counts_its_share_of_the_bytes(cache, tmp_path):
    view = make_view(cache, tmp_path / "view", list(range(0, ROWS, 2)))
    whole, mine = column_bytes(cache), column_bytes(view)
    assert mine.keys() == whole.keys()
    for name, size in whole.items():
        assert mine[name] == round(size * len(view) / ROWS)
    (source,) = list_sources(view)
    assert source.cache.path == cache.path.resolve() and len(source.rows) == len(view)


def make_overlay(folder: Path, draft: Draft, rows: list[int], **changes) -> TeacherCache:
    """A cache that says more of some rows: other signals, or other targets."""
    small = {"columns": {}, "signals": {"layer.3": Signal(width=5, dtype="float32")}}
    over = make_draft(len(rows), shard_examples=5, **(small | changes))
    examples = [replace(make_example(row, over), columns={}) for row in rows]
    write_cache(folder, over, examples)
    return TeacherCache.open(folder)


def test_an_overlay_adds_signals_to_the_rows_below(cache, draft, tmp_path):
    rows = [0, 3, 4, 5, 11, 20]
    small = TargetsSpec(top_k=1, codec="lossless")
    more = make_overlay(tmp_path / "more", draft, rows, targets=small)
    base = select_rows(cache, RowRuns.of(np.array(rows)))[0]
    over = replace(base, overlays=(Overlay(more, all_rows(more)),))
    view = write_view(tmp_path / "view", [over])
    assert set(view.manifest.signals) == {*SIGNALS, "layer.3"}
    assert view.manifest.targets == cache.manifest.targets
    for at, row in enumerate(rows):
        found = view[at]
        assert torch.equal(found.hidden["layer.3"], more[at].hidden["layer.3"])
        assert_same(replace(found, hidden={n: found.hidden[n] for n in SIGNALS}), cache[row])
    narrower = make_view(view, tmp_path / "narrower", [1, 4])
    assert torch.equal(narrower[1].hidden["layer.3"], more[4].hidden["layer.3"])
    assert_same(replace(narrower[1], hidden=cache[11].hidden), cache[11])


def test_an_overlay_brings_other_temperatures(cache, draft, tmp_path):
    spec = TargetsSpec(top_k=8, tail_draws=3, temperatures=(1.0, 2.0, 4.0), codec="lossless")
    hot = make_overlay(tmp_path / "hot", draft, list(range(ROWS)), targets=spec, signals={})
    base = list_parts(cache)[0]
    view = write_view(
        tmp_path / "view", [replace(base, overlays=(Overlay(hot, all_rows(hot), targets=True),))]
    )
    assert view.manifest.targets.temperatures == (1.0, 2.0, 4.0)
    found = view[7]
    assert dict(found.columns) == dict(cache[7].columns)
    assert found.targets.temperatures == (1.0, 2.0, 4.0)
    assert torch.equal(found.targets.logsumexp, hot[7].targets.logsumexp)
    assert torch.equal(found.hidden["pooled"], cache[7].hidden["pooled"])


def test_an_overlay_about_other_tokens_is_refused(cache, draft, tmp_path):
    small = TargetsSpec(top_k=1, codec="lossless")
    more = make_overlay(tmp_path / "more", draft, [5, 7], targets=small)
    base = select_rows(cache, RowRuns.of(np.array([5, 6])))[0]
    over = replace(base, overlays=(Overlay(more, all_rows(more)),))
    view = write_view(tmp_path / "view", [over])
    assert view[0].example_id == "text-5"
    with pytest.raises(MismatchError, match="other tokens than example 'text-6'"):
        view[1]


def test_a_changed_cache_below_is_noticed(cache, tmp_path):
    shutil.copytree(cache.path, tmp_path / "cache")
    make_view(TeacherCache.open(tmp_path / "cache"), tmp_path / "view", [1, 4])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"view: sees .*cache, which is not there; bring it"):
        TeacherCache.open(tmp_path / "view")
    write_cache(tmp_path / "cache", make_draft(ROWS))
    with pytest.raises(MismatchError, match="a view of another cache than stands in"):
        TeacherCache.open(tmp_path / "view")


@pytest.mark.parametrize("file", ["view.json", "rows"])
def test_a_damaged_view_is_refused(cache, tmp_path, file):
    view = make_view(cache, tmp_path / "view", [1, 4, 5])
    damaged = next(view.path.glob("rows/*")) if file == "rows" else view.path / file
    content = bytearray(damaged.read_bytes())
    for at in range(0, len(content), 7):
        flipped = bytes(content[:at]) + bytes([content[at] ^ 1]) + bytes(content[at + 1 :])
        damaged.write_bytes(flipped)
        with pytest.raises(CacheError, match="make the view again"):
            TeacherCache.open(view.path)
    damaged.unlink()
    with pytest.raises(CacheError):
        TeacherCache.open(view.path)


def test_rows_that_a_cache_does_not_have_are_refused(cache, tmp_path):
    view = make_view(cache, tmp_path / "view", [1, 4])
    raw = json.loads((view.path / "view.json").read_text())
    for starts, counts in (([0, 22], [2, 2]), ([4, 1], [1, 1]), ([-1], [3]), ([2**62], [2**62])):
        wrong = write_runs(view.path, RowRuns(np.array(starts), np.array(counts)))
        write_sealed(view.path / "view.json", raw | {"parts": [raw["parts"][0] | {"rows": wrong}]})
        with pytest.raises(CacheError, match="not ascending rows below 23"):
            TeacherCache.open(view.path)


def test_a_view_stands_when_view_json_does(cache, tmp_path):
    view = make_view(cache, tmp_path / "view", [1, 4])
    content = (view.path / "view.json").read_bytes()
    (view.path / "view.json").unlink()
    with pytest.raises(CacheError, match="is no cache"):
        TeacherCache.open(view.path)
    make_view(cache, view.path, [1, 4])
    assert (view.path / "view.json").read_bytes() == content
    with pytest.raises(CacheError, match="holds another view"):
        make_view(cache, view.path, [1, 5])
    with pytest.raises(CacheError, match="holds a cache"):
        make_view(cache, cache.path, [1, 4])
    with pytest.raises(CacheError, match=r"holds a view \(view\.json\)"):
        write_cache(view.path, make_draft(3))


def test_a_view_says_in_plain_files_what_it_is_made_of(cache, tmp_path):
    view = make_view(cache, tmp_path / "view", [0, 1, 2, 7, 9, 10])
    (part,) = json.loads((view.path / "view.json").read_text())["parts"]
    below = (view.path / part["path"]).resolve()
    manifest = json.loads((below / "manifest.json").read_text())
    told = {name: value for name, value in manifest.items() if name not in ("checksum", "files")}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert part["digest"] == hashlib.sha256(text.encode()).hexdigest()
    file = view.path / "rows" / f"{part['rows']}.arrow"
    assert part["rows"] == hashlib.sha256(file.read_bytes()).hexdigest()
    runs = pa.ipc.open_file(file).read_all().to_pydict()
    assert runs == {"first_row": [0, 7, 9], "rows": [3, 1, 2]}


@pytest.mark.parametrize("linked", ["view.json", "rows", "manifest.json"])
def test_a_link_out_of_a_view_or_its_caches_is_refused(cache, tmp_path, linked):
    shutil.copytree(cache.path, tmp_path / "cache")
    view = make_view(TeacherCache.open(tmp_path / "cache"), tmp_path / "view", [1, 4])
    folder = tmp_path / "cache" if linked == "manifest.json" else view.path
    (folder / linked).rename(tmp_path / "elsewhere")
    (folder / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="link"):
        TeacherCache.open(view.path)


def test_verify_looks_at_all_that_a_view_sees(cache, tmp_path):
    shutil.copytree(cache.path, tmp_path / "cache")
    view = make_view(TeacherCache.open(tmp_path / "cache"), tmp_path / "view", [1, 4, 9])

    def verify(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["verify", str(view.path), *options])
        return result.exit_code, result.output

    assert verify()[0] == 0
    code, output = verify("--json")
    assert code == 0 and json.loads(output)["caches"][0]["path"].endswith("cache")
    for file in (next(view.path.glob("rows/*")), tmp_path / "cache/shards/00003/rows.arrow"):
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        code, output = verify()
        assert code == 4 and "damaged" in output and file.name in "".join(output.split())
        file.write_bytes(content)
    (view.path / "view.json").write_text("{}")
    assert verify()[0] == 4


def test_a_newer_view_is_refused(cache, tmp_path):
    view = make_view(cache, tmp_path / "view", [1, 4])
    raw = json.loads((view.path / "view.json").read_text())
    write_sealed(view.path / "view.json", raw | {"version": 2})
    with pytest.raises(CacheError, match="format 2, this Stillroom reads up to 1"):
        TeacherCache.open(view.path)


def test_caches_of_other_settings_are_no_view(cache, tmp_path):
    write_cache(tmp_path / "other", make_draft(3, signals=SIGNALS, num_classes=60))
    other = TeacherCache.open(tmp_path / "other")
    with pytest.raises(MismatchError, match="num_classes 60, asked for 50"):
        write_view(tmp_path / "view", [*list_parts(cache), *list_parts(other)])


def test_views_and_caches_lie_in_stores_too(cache, draft, tmp_path):
    store = as_path("memory://shelf/views")
    with writing_folder(store / "cache") as folder:
        shutil.copytree(cache.path, folder, dirs_exist_ok=True)
    remote = TeacherCache.open(store / "cache")
    for path in (tmp_path / "view", store / "view", store / "cache" / "inside"):
        view = make_view(remote, path, [1, 4, 20])
        assert_same(view[2], cache[20])
    parts = [
        json.loads((p / "view.json").read_text())["parts"]
        for p in (store / "view", tmp_path / "view")
    ]
    assert [part["path"] for (part,) in parts] == ["memory://shelf/views/cache"] * 2
    with pytest.raises(CacheError, match="cannot speak of"):
        make_view(cache, store / "other", [1])
