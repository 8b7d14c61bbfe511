"""Several caches as one: every example once, nothing that does not belong."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from cache_examples import assert_same, make_draft, make_example, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.cache import CacheWriter, Identity, Signal, TargetsSpec, TeacherCache
from pipeline.cache.signals.projection import Random
from pipeline.errors import ConfigError, MismatchError
from stages.merge import merge
from stages.select import Choice, select

QUIET = Console(quiet=True)
KEPT: dict[str, Any] = {"top_k": 8, "tail_draws": 3, "temperatures": (2.0,), "codec": "lossless"}


def make_cache(path: Path, rows: Iterable[int], **changes: Any) -> Path:
    rows = list(rows)
    draft = make_draft(len(rows), **changes)
    write_cache(path, draft, [make_example(row, draft) for row in rows])
    return path


numbers = st.lists(st.integers(0, 12), min_size=1, unique=True)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(numbers, min_size=2, max_size=4))
def test_every_example_of_several_caches_is_there_once(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("merged")
    paths = [make_cache(folder / str(at), some) for at, some in enumerate(rows)]
    view = merge(paths, folder / "all", QUIET)
    each = list(dict.fromkeys(row for some in rows for row in some))
    assert list(view.ids()) == [f"text-{row}" for row in each]
    for row in each:
        assert_same(view.by_id(f"text-{row}"), make_example(row, make_draft(1)))


def test_views_are_merged_like_caches(tmp_path):
    whole = make_cache(tmp_path / "whole", range(10))
    for name, first, every in (("low", 4, 1), ("even", None, 2)):
        select(whole, tmp_path / name, Choice(every=every, first=first), QUIET)
    view = merge([tmp_path / "low", tmp_path / "even"], tmp_path / "both", QUIET)
    assert list(view.ids()) == [f"text-{row}" for row in (0, 1, 2, 3, 4, 6, 8)]
    assert {part.cache.path.name for part in view.parts} == {"whole"}


def test_an_id_of_two_contents_is_refused(tmp_path):
    one, draft = make_cache(tmp_path / "one", range(4)), make_draft(2)
    changed = replace(make_example(9, draft), example_id="text-3")
    write_cache(tmp_path / "two", draft, [make_example(8, draft), changed])
    with pytest.raises(MismatchError, match="two: example 'text-3' is another than in"):
        merge([one, tmp_path / "two"], tmp_path / "view", QUIET)
    assert not (tmp_path / "view").exists()


def told(part: str) -> Identity:
    digests = {p: {"digest": f"{p}-digest"} for p in Identity.model_fields}
    return Identity(**digests | {part: {"digest": "another"}})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"identity": told("teacher")}, r"teacher\.digest"),
        ({"identity": told("tokenizer")}, r"tokenizer\.digest"),
        ({"task": {"name": "causal-lm", "block_size": 9}}, r"task\.block_size"),
        ({"num_classes": 51}, "num_classes"),
        ({"targets": TargetsSpec(**KEPT | {"top_k": 7})}, r"targets\.top_k"),
        ({"targets": TargetsSpec(**KEPT | {"temperatures": (4.0,)})}, r"targets\.temperatures"),
        ({"targets": TargetsSpec(**KEPT | {"codec": "steps"})}, r"targets\.codec\.name"),
        ({"signals": {"layer.1": Signal(width=4)}}, r"signals\.layer\.1"),
        ({"columns": {"split": "string"}}, r"columns\.weight"),
        ({"label_names": [f"word {i}" for i in range(50)]}, "label_names"),
    ],
)  # fmt: skip
def test_a_cache_of_another_kind_is_refused(tmp_path, changes, field):
    one = make_cache(tmp_path / "one", range(3))
    draft = make_draft(2, **changes)
    examples = [make_example(row, draft) for row in (7, 8)]
    columns = [{n: e.columns[n] for n in draft.columns} for e in examples]
    examples = [replace(e, columns=c) for e, c in zip(examples, columns, strict=True)]
    write_cache(tmp_path / "two", draft, examples)
    with pytest.raises(MismatchError, match=f"two: cached with .*{field} .*Only caches of one"):
        merge([one, tmp_path / "two"], tmp_path / "view", QUIET)


def test_other_data_and_another_compression_do_not_matter(tmp_path):
    one = make_cache(tmp_path / "one", range(3), identity=told("data"))
    two = make_cache(
        tmp_path / "two",
        range(3, 5),
        identity=told("preprocessing"),
        targets=TargetsSpec(**KEPT, compression="lz4"),
        shard_examples=1,
    )
    view = merge([one, two], tmp_path / "view", QUIET)
    assert len(view) == 5
    assert view.manifest.identity.data != TeacherCache.open(one).manifest.identity.data


def test_vectors_of_other_projections_are_refused(tmp_path):
    signal = Signal(width=2, source_width=6, projection=Random(width=2), dtype="float32")
    paths = [
        make_cache(tmp_path / str(seed), rows, signals={
            "layer.1": signal.model_copy(update={"projection": Random(width=2, seed=seed)})
        })
        for seed, rows in ((0, range(3)), (1, range(3, 6)))
    ]  # fmt: skip
    with pytest.raises(MismatchError, match="projections"):
        merge(paths, tmp_path / "view", QUIET)


def make_gapped(path: Path, rows: Iterable[int], gap: int, reason: str) -> Path:
    """A cache whose teacher could not answer one example."""
    rows = list(rows)
    draft = make_draft(len(rows), shard_examples=len(rows))
    writer = CacheWriter(path, draft)
    with writer.shard(0) as shard:
        for row in rows:
            example = make_example(row, draft)
            shard.skip(example, reason) if row == gap else shard.add(example)
    writer.finish()
    return path


@pytest.mark.parametrize("order", list(permutations(["answered", "gap", "other gap"])))
def test_an_answer_is_taken_wherever_it_stands_and_the_gap_goes(tmp_path, order):
    make_cache(tmp_path / "answered", range(3, 6))
    make_gapped(tmp_path / "gap", range(5), 3, "out of memory")
    make_gapped(tmp_path / "other gap", range(2, 7), 3, "NaN")
    view = merge([tmp_path / name for name in order], tmp_path / "view", QUIET)
    assert sorted(view.ids()) == [f"text-{row}" for row in range(7)] and not view.skipped
    for row in range(7):
        assert_same(view.by_id(f"text-{row}"), make_example(row, make_draft(1)))
    train = {f"text-{row}" for row in range(7) if row % 3 != 2}
    assert set(view.ids("train")) == train and len(list(view.stream(seed=0, epoch=0))) == 7
    again = merge([tmp_path / "view", tmp_path / "gap"], tmp_path / "again", QUIET)
    assert list(again.ids()) == list(view.ids()) and not again.skipped


def test_what_no_cache_could_answer_stays_a_gap_with_the_first_reason(tmp_path):
    one = make_gapped(tmp_path / "one", range(4), 3, "out of memory")
    two = make_gapped(tmp_path / "two", [3, 8], 3, "NaN")
    view = merge([one, two], tmp_path / "view", QUIET)
    assert list(view.ids()) == [f"text-{row}" for row in (0, 1, 2, 3, 8)]
    assert view.skipped == {"text-3": "out of memory"}


def test_a_cache_of_nothing_but_a_gap_leaves_the_view(tmp_path):
    gap = make_gapped(tmp_path / "gap", [3], 3, "NaN")
    view = merge([gap, make_cache(tmp_path / "one", range(4))], tmp_path / "view", QUIET)
    assert [part.cache.path.name for part in view.parts] == ["one"] and not view.skipped


def test_a_gap_of_another_text_is_refused(tmp_path):
    draft = make_draft(2)
    changed = replace(make_example(9, draft), example_id="text-3")
    write_cache(tmp_path / "one", draft, [make_example(8, draft), changed])
    gap = make_gapped(tmp_path / "gap", range(4), 3, "NaN")
    for paths in ([tmp_path / "one", gap], [gap, tmp_path / "one"]):
        with pytest.raises(MismatchError, match="example 'text-3' is another than in"):
            merge(paths, tmp_path / "view", QUIET)


def test_one_cache_is_no_two(tmp_path):
    with pytest.raises(ConfigError, match="give several caches"):
        merge([make_cache(tmp_path / "one", range(2))], tmp_path / "view", QUIET)
