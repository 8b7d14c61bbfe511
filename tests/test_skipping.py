"""An example that the teacher cannot answer stops the stage, or leaves a gap that is told of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_teachers import (
    make_config,
    make_llama,
    make_rows,
    make_tokenizer,
    read_files,
    save_teacher,
    write_rows,
)

from pipeline.batches import Selection
from pipeline.cache import RowRuns, TeacherCache, select_rows, write_view
from pipeline.cache.gaps import allow_skips
from pipeline.config import parse_config
from pipeline.errors import CacheError, DataError, NumericalError
from pipeline.targets import Targets
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.export_cache import export_cache
from stages.import_dump import import_dump
from stages.import_reading import ImportConfig
from stages.merge import merge

COUNT = 24
TASK = {"name": "causal-lm", "block_size": 64, "packing": False, "overlong": "truncate"}
HIDDEN = {"layers": [-1], "pooled": True}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("healthy"), make_llama())


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher for whom an exclamation mark is not a number."""
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[make_tokenizer().convert_tokens_to_ids("!")] = torch.nan
    return save_teacher(tmp_path_factory.mktemp("sick"), model)


def exclaim(folder: Path, *numbers: int) -> Path:
    rows = [{**row, "text": row["text"][-60:]} for row in make_rows(COUNT)]
    for number in numbers:
        rows[number]["text"] += "!"
    return write_rows(folder / "rows.jsonl", rows)


def by_class(targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = targets.ids.sort(dim=1)
    return ids, targets.logits.gather(1, order)


def make(root: Path, teacher: Path, data: Path, **changes: Any) -> CacheConfig:
    settings = {"task": TASK, "hidden": HIDDEN, "on_error": "skip", **changes}
    return make_config(root, teacher, data, **settings)


def run(config: CacheConfig) -> TeacherCache:
    return TeacherCache.open(cache_teacher(config, progress=False))


def test_nan_in_one_example_leaves_a_gap_and_the_others_of_its_batch_as_they_are(
    tmp_path: Path, sick: Path, healthy: Path
) -> None:
    data = exclaim(tmp_path, 13)
    cache = run(make(tmp_path / "sick", sick, data))
    assert cache.skipped == {"row 13": "the teacher's logits hold NaN or infinity"}
    whole = run(make(tmp_path / "healthy", healthy, data))
    assert len(cache) == len(whole) == COUNT
    for row in range(COUNT):
        found, expected = cache[row], whole[row]
        assert found.example_id == expected.example_id
        if row == 13:
            assert found.input_ids.tolist() == expected.input_ids.tolist()
            assert len(found.targets) == len(found.target_positions) == 0
            assert list(found.hidden["layer.2"].shape) == [0, 32]
            assert not found.hidden["pooled"].any()
        else:
            # Entries of a target are in the order of the shard's most frequent classes.
            (ids, logits), (same, known) = map(by_class, (found.targets, expected.targets))
            assert ids.equal(same) and logits.equal(known)
            assert found.targets.logsumexp.equal(expected.targets.logsumexp)
            assert found.hidden["layer.2"].equal(expected.hidden["layer.2"])


def test_no_stream_and_no_split_has_the_gap_and_yet_it_can_be_looked_at(
    tmp_path: Path, sick: Path
) -> None:
    cache = run(make(tmp_path, sick, exclaim(tmp_path, 13)))
    others = [row for row in range(COUNT) if row != 13]
    assert list(cache.split_indices("train")) == others
    assert list(Selection(cache).indices) == others
    assert "row 13" not in list(cache.ids("train")) and "row 13" in cache
    streamed = [example.example_id for example in cache.stream(seed=0, epoch=0)]
    assert sorted(streamed) == sorted(f"row {row}" for row in others)
    assert len(cache.by_id("row 13").targets) == 0


def test_a_capture_with_a_gap_that_goes_on_leaves_the_same_bytes(
    tmp_path: Path, sick: Path
) -> None:
    data = exclaim(tmp_path, 13)
    whole = make(tmp_path / "whole", sick, data)
    cache_teacher(whole, progress=False)
    parts = make(tmp_path / "parts", sick, data)
    cache_teacher(parts, progress=False, shard_range="2:")
    cache_teacher(parts, progress=False)
    assert read_files(parts.output) == read_files(whole.output)


def test_a_gap_in_any_cache_of_a_view_is_a_gap_of_the_view(tmp_path: Path, sick: Path) -> None:
    parts = []
    for name, number in (("a", 2), ("b", 13)):
        (tmp_path / name).mkdir()
        rows = [json.loads(line) for line in exclaim(tmp_path, number).read_text().splitlines()]
        renamed = [{**row, "id": f"{name} {row['id']}"} for row in rows]
        data = write_rows(tmp_path / name / "rows.jsonl", renamed)
        parts.append(cache_teacher(make(tmp_path / name, sick, data), progress=False))
    view = merge(parts, tmp_path / "both")
    assert set(view.skipped) == {"a row 2", "b row 13"}
    gaps = [view.find_row(name) for name in view.skipped]
    assert len(view) == 2 * COUNT and not set(gaps) & set(view.split_indices("train"))
    assert all(len(example.targets) for example in view.stream(seed=0, epoch=0))


def test_what_is_too_long_is_skipped_unasked(tmp_path: Path, healthy: Path) -> None:
    rows = [{**row, "text": row["text"][-60:]} for row in make_rows(COUNT)]
    rows[5]["text"] *= 9
    data = write_rows(tmp_path / "rows.jsonl", rows)
    task = {**TASK, "block_size": 128}
    with pytest.raises(DataError, match=r"'row 5': is .* tokens long"):
        run(make(tmp_path, healthy, data, task=task, on_error="stop"))
    cache = run(make(tmp_path, healthy, data, task=task))
    (reason,) = cache.skipped.values()
    assert "row 5" in cache.skipped and reason.endswith("the teacher reads at most 64")


def test_the_default_stops_and_so_do_too_many(tmp_path: Path, sick: Path) -> None:
    data = exclaim(tmp_path, 13, 14)
    with pytest.raises(NumericalError, match="row 1"):
        run(make(tmp_path / "default", sick, data, on_error="stop"))
    found = "2 of 24 examples would be skipped, at most 1 may be; 'row 14': the teacher's logits"
    with pytest.raises(DataError, match=found):
        run(make(tmp_path / "cache", sick, data))
    assert [allow_skips(n) for n in (1, 199, 200, 5_000, 10**8)] == [1, 1, 2, 50, 10_000]


def test_a_view_knows_of_the_gap_where_it_takes_it(tmp_path: Path, sick: Path) -> None:
    cache = run(make(tmp_path, sick, exclaim(tmp_path, 13)))
    for name, rows in (("with", [4, 13, 20]), ("without", [4, 12, 20])):
        view = write_view(tmp_path / name, select_rows(cache, RowRuns.of(np.array(rows))))
        assert list(view.skipped) == (["row 13"] if name == "with" else [])
        known = [f"row {row}" for row in rows if row != 13]
        assert sorted(e.example_id for e in view.stream(seed=0, epoch=0)) == sorted(known)
        assert list(view.ids("train")) == known
    view = write_view(tmp_path / "alone", select_rows(cache, RowRuns.of(np.array([13]))))
    with pytest.raises(CacheError, match="has no answer to any example of the split 'train'"):
        view.split_indices("train")


def test_a_gap_stays_one_through_an_export_and_an_import(tmp_path: Path, sick: Path) -> None:
    cache = run(make(tmp_path, sick, exclaim(tmp_path, 13)))
    settings = {
        "output": str(tmp_path / "again"),
        "format": "stillroom",
        "files": str(export_cache(cache.path, "jsonl", tmp_path / "plain.jsonl")),
        "tokenizer": str(sick),
        "teacher": {"model": "somebody/teacher"},
    }
    config = parse_config(ImportConfig, settings, "the import")
    again = TeacherCache.open(import_dump(config, progress=False))
    assert again.skipped == cache.skipped and len(again) == COUNT
    assert list(again.ids("train")) == list(cache.ids("train"))


# Row 2 is in the shard that bases are fitted to, row 13 in a later one.
@pytest.mark.parametrize(("number", "projection"), [(2, "pca"), (13, "pca"), (2, "random")])
def test_a_vector_that_its_projection_makes_too_large_leaves_a_gap(
    tmp_path: Path, number: int, projection: str
) -> None:
    loud = make_llama()
    with torch.no_grad():  # each number fits float16, their length does not
        loud.model.embed_tokens.weight[make_tokenizer().convert_tokens_to_ids("!")] = 6e4
    teacher, data = save_teacher(tmp_path / "teacher", loud), exclaim(tmp_path, number)
    hidden = {"layers": [0], "projection": {"name": projection, "width": 4}}
    stopped = make(tmp_path / "stopped", teacher, data, hidden=hidden, on_error="stop")
    with pytest.raises(NumericalError, match=r"hidden layer.0 holds numbers above the 65504 of"):
        run(stopped)
    cache = run(make(tmp_path / "whole", teacher, data, hidden=hidden))
    reason = "hidden layer.0 holds numbers above the 65504 of float16 once it is projected"
    assert cache.skipped == {f"row {number}": reason}
    assert len(cache[number].targets) == len(cache[number].hidden["layer.0"]) == 0
    for row in set(range(COUNT)) - {number}:
        assert len(cache[row].hidden["layer.0"]) == len(cache[row].targets) > 0
    gone_on = run(stopped.model_copy(update={"on_error": "skip"}))
    assert read_files(gone_on.path) == read_files(cache.path)
    roomy = make(tmp_path / "roomy", teacher, data, hidden={**hidden, "dtype": "int8"})
    assert not run(roomy).skipped
