"""A cache grows: only what it does not hold is asked of the teacher, and all is read as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_teachers import make_bert, make_llama, make_rows, save_teacher, write_rows
from small_translators import make_t5, make_translation_cache

from pipeline.cache import CacheView, Draft, TeacherCache
from pipeline.config import load_config
from pipeline.errors import CacheError, ConfigError, MismatchError
from stages.add_signal import add_signal
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.extend import extend
from stages.select import Choice, select

ROWS = make_rows(30)
OLD, NEW = ROWS[:18], ROWS[18:]


def ask(root: Path, rows: list[dict[str, Any]], **changes: Any) -> CacheConfig:
    """A config over these rows, of the small classifier in root/teacher."""
    settings: dict[str, Any] = {
        "output": str(root / "cache"),
        "task": {"name": "sequence-classification", "max_length": 48},
        "data": {"source": str(write_rows(root / f"{len(rows)}.jsonl", rows)), "carry": ["text"]},
        "teacher": {"model": str(root / "teacher")},
        "targets": {"top_k": 2, "temperatures": [1.0, 2.0], "codec": "lossless"},
        "hidden": {"layers": [-1], "pooled": True, "dtype": "float32"},
        "batch": {"tokens": 256},
        "shard": {"examples": 8},
    }
    return CacheConfig.model_validate(settings | changes)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", make_bert())
    return cache_teacher(ask(tmp_path, OLD), progress=False)


def grow(root: Path, rows: list[dict[str, Any]], again: bool = False, **changes: Any) -> CacheView:
    config = ask(root, rows, **changes)
    view = extend(root / "cache", config, root / "larger", replace=again, progress=False)
    assert isinstance(view, CacheView)
    return view


def asked(root: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((root / "larger" / "added" / "capture.json").read_text())
    return log


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_says(view: TeacherCache, whole: TeacherCache) -> None:
    """The same examples in the same order, and of them the same but for rounding."""
    assert list(view.ids()) == list(whole.ids())
    for row in range(len(whole)):
        ours, theirs = view[row], whole[row]
        assert dict(ours.columns) == dict(theirs.columns)
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        torch.testing.assert_close(ours.targets.logsumexp, theirs.targets.logsumexp)
        for name in whole.manifest.signals:
            torch.testing.assert_close(ours.hidden[name], theirs.hidden[name], rtol=1e-4, atol=1e-5)


def test_only_what_is_new_is_asked(cache: Path, tmp_path: Path) -> None:
    before = read_all(cache)
    view = grow(tmp_path, ROWS)
    assert read_all(cache) == before
    added = [view[row] for row in range(len(OLD), len(ROWS))]
    assert asked(tmp_path)["examples"] == len(NEW)
    assert asked(tmp_path)["tokens"] == sum(len(example.input_ids) for example in added)
    whole = cache_teacher(ask(tmp_path, ROWS, output=str(tmp_path / "whole")), progress=False)
    assert_says(TeacherCache.open(tmp_path / "larger"), TeacherCache.open(whole))


def test_data_of_new_rows_alone_extend_a_cache_too(cache: Path, tmp_path: Path) -> None:
    view = grow(tmp_path, NEW)
    assert len(view) == len(ROWS) and asked(tmp_path)["examples"] == len(NEW)


def test_a_view_grows_further(cache: Path, tmp_path: Path) -> None:
    grow(tmp_path, ROWS[:22])
    again = ask(tmp_path, ROWS)
    view = extend(tmp_path / "larger", again, tmp_path / "largest", progress=False)
    assert [len(part.rows) for part in view.parts] == [18, 4, 8]
    assert list(view.ids()) == [row["id"] for row in ROWS]


def test_a_cache_with_an_added_layer_grows_by_examples_that_have_it(
    cache: Path, tmp_path: Path
) -> None:
    deeper = add_signal(cache, tmp_path / "deeper", ["hidden.layers=[1]"], progress=False)
    both = {"layers": [-1, 1], "pooled": True, "dtype": "float32"}
    view = extend(deeper.path, ask(tmp_path, ROWS, hidden=both), tmp_path / "all", progress=False)
    assert len(view) == len(ROWS)
    for row in (0, len(OLD) - 1, len(OLD), len(ROWS) - 1):
        assert set(view[row].hidden) == {"layer.1", "layer.2", "pooled"}
        assert len(view[row].hidden["layer.1"]) == len(view[row].input_ids)


def test_nothing_new_is_said_and_asks_no_teacher(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_teacher(tmp_path)
    found = extend(cache, ask(tmp_path, OLD), tmp_path / "larger")
    assert found.path == tmp_path / "larger" and list(found.ids()) == [row["id"] for row in OLD]
    assert "nothing is new" in capsys.readouterr().out
    assert not (tmp_path / "larger" / "added").exists()


@pytest.mark.parametrize("there", ["a cache", "a run"])
def test_where_no_view_can_stand_no_teacher_is_asked(
    cache: Path, tmp_path: Path, there: str
) -> None:
    output = cache if there == "a cache" else tmp_path / "run"
    output.mkdir(exist_ok=True)
    if there == "a run":
        (output / "result.json").touch()
    before = sorted(output.rglob("*"))
    with pytest.raises(CacheError, match=f"holds {there}"):
        extend(cache, ask(tmp_path, ROWS), output, progress=False)
    with pytest.raises(CacheError, match=f"holds {there}"):
        add_signal(cache, output, ["hidden.layers=[1]"], progress=False)
    if there == "a run":
        with pytest.raises(CacheError, match="holds a run"):
            cache_teacher(ask(tmp_path, ROWS, output=str(output)), progress=False)
    assert sorted(output.rglob("*")) == before


def test_an_interrupted_extension_continues_and_leaves_the_same_bytes(
    cache: Path, tmp_path: Path
) -> None:
    grow(tmp_path, ROWS)
    expected = read_all(tmp_path / "larger")
    added = tmp_path / "larger" / "added"
    manifest = json.loads((added / "manifest.json").read_text())
    for lost in (
        ["view.json"],
        ["view.json", "added/manifest.json", "added/shards/00001/shard.json"],
    ):
        for name in lost:
            (tmp_path / "larger" / name).unlink()
        if len(lost) > 1:  # as it is while a cache is written
            draft = {n: v for n, v in manifest.items() if n in Draft.model_fields}
            (added / "draft.json").write_text(json.dumps(draft))
        grow(tmp_path, ROWS)
        found = read_all(tmp_path / "larger")
        assert {n for n in found if found[n] != expected.get(n)} <= {"added/capture.json"}
        assert found.keys() == expected.keys()


def test_changed_content_is_refused_or_takes_its_place(cache: Path, tmp_path: Path) -> None:
    changed = [
        {**row, "text": "the teacher speaks"} if at == 5 else row for at, row in enumerate(ROWS)
    ]
    with pytest.raises(
        MismatchError, match="holds example 'row 5' with other content than the data"
    ):
        grow(tmp_path, changed)
    assert not (tmp_path / "larger" / "view.json").exists()
    view = grow(tmp_path, changed, again=True)
    assert len(view) == len(ROWS) and asked(tmp_path)["examples"] == len(NEW) + 1
    assert view.by_id("row 5").columns["text"] == "the teacher speaks"
    assert [len(part.rows) for part in view.parts] == [17, 13]
    with pytest.raises(MismatchError, match="--replace"):
        grow(tmp_path, changed)


def pack(root: Path, rows: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    """Settings of a language model that reads several rows in one block; carries nothing."""
    data = {"source": str(write_rows(root / "packed.jsonl", rows)), **data}
    return {"task": {"name": "causal-lm", "block_size": 32}, "hidden": {}, "data": data}


def break_teacher(root: Path) -> None:
    """Whoever loads it from now on fails."""
    (root / "teacher" / "model.safetensors").write_bytes(b"?" * 100)


def test_packed_rows_extend_a_cache_by_themselves(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", make_llama())
    cache_teacher(ask(tmp_path, [], **pack(tmp_path, OLD)), progress=False)
    view = grow(tmp_path, [], **pack(tmp_path, NEW))
    assert len(view.parts) == 2
    assert any(len(view[row].segment_lengths) > 1 for row in range(len(view)))


@pytest.mark.parametrize(
    "rows", [[*OLD[:9], *NEW, *OLD[9:]], [*NEW[:2], *OLD], [*NEW, OLD[4]], [*OLD, *NEW]]
)
def test_rows_that_would_be_packed_anew_are_refused_before_the_teacher_is_loaded(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    save_teacher(tmp_path / "teacher", make_llama())
    cache_teacher(ask(tmp_path, [], **pack(tmp_path, OLD)), progress=False)
    break_teacher(tmp_path)
    with pytest.raises(MismatchError, match="where the config has the new rows alone"):
        grow(tmp_path, [], **pack(tmp_path, rows))
    with pytest.raises(ConfigError, match="extend: --replace takes one example for another"):
        grow(tmp_path, [], again=True, **pack(tmp_path, rows))
    assert not (tmp_path / "larger" / "view.json").exists()


def test_packed_rows_may_be_there_again_where_their_blocks_are_the_same(tmp_path: Path) -> None:
    """Blocks never mix languages, so that another one leaves those that stand as they are."""
    save_teacher(tmp_path / "teacher", make_llama())
    old = [{**row, "language": "en"} for row in OLD]
    new = [{**row, "language": "de"} for row in NEW]
    carried = {"carry": ["language"]}
    base = cache_teacher(ask(tmp_path, [], **pack(tmp_path, old, **carried)), progress=False)
    view = grow(tmp_path, [], **pack(tmp_path, [*new, *old], **carried))
    fresh = view.group("language")["de"]
    assert len(fresh) + len(TeacherCache.open(base)) == len(view)
    whole = ask(tmp_path, [], output=str(tmp_path / "whole"), **pack(tmp_path, new, **carried))
    assert list(TeacherCache.open(cache_teacher(whole, progress=False)).ids()) == [
        view[row].example_id for row in fresh
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"targets": {"top_k": 1, "codec": "lossless"}}, r"targets\.temperatures"),
        ({"hidden": {"layers": [1], "pooled": True, "dtype": "float32"}}, r"signals\.layer\.1"),
        ({"task": {"name": "sequence-classification", "max_length": 40}}, r"task\.max_length"),
    ],
)
def test_other_settings_are_refused_before_the_teacher_is_asked(
    cache: Path, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(MismatchError, match=f"cached with .*{field}"):
        grow(tmp_path, NEW, **changes)
    assert not (tmp_path / "larger" / "added" / "shards").exists()


def test_another_task_is_named_before_what_comes_of_it(cache: Path, tmp_path: Path) -> None:
    shorter = {"name": "sequence-classification", "max_length": 3}
    with pytest.raises(MismatchError, match=r"cached with task\.max_length 48, asked for 3"):
        grow(tmp_path, ROWS, task=shorter)


def test_a_cache_grows_by_its_own_config_whatever_the_task_took_from_the_teacher(
    tmp_path: Path,
) -> None:
    cache = TeacherCache.open(make_translation_cache(tmp_path, make_t5()))
    assert isinstance(cache.manifest.task["decoder_start"], int)
    config = load_config(CacheConfig, cache.path / "config.yaml")
    select(cache.path, tmp_path / "half", Choice(every=2))
    view = extend(tmp_path / "half", config, tmp_path / "larger", progress=False)
    assert sorted(view.ids()) == sorted(cache.ids())
    other = config.task.model_copy(update={"decoder_start": 7})
    with pytest.raises(MismatchError, match=r"cached with task\.decoder_start \d+, asked for 7"):
        extend(cache.path, config.model_copy(update={"task": other}), tmp_path / "other")


def test_another_teacher_is_refused(cache: Path, tmp_path: Path) -> None:
    changed = make_bert()
    with torch.no_grad():
        changed.classifier.bias[0] += 1e-3
    save_teacher(tmp_path / "teacher", changed)
    with pytest.raises(MismatchError, match=r"teacher\.digest"):
        grow(tmp_path, ROWS)


def test_what_is_added_is_projected_like_what_stands(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", make_llama())
    kept = {
        "task": {"name": "causal-lm", "block_size": 32},
        "hidden": {
            "layers": [-1],
            "head": True,
            "dtype": "float32",
            "projection": {"name": "pca", "width": 20},
        },
    }
    base = TeacherCache.open(cache_teacher(ask(tmp_path, OLD, **kept), progress=False))
    view = grow(tmp_path, NEW[:1], **kept)  # too few vectors to fit a projection to
    assert view.manifest.projections == base.manifest.projections
    assert view.manifest.head == base.manifest.head
    assert view[len(view) - 1].hidden["layer.2"].shape[1] == 20
    assert torch.equal(view.read_head().weight, base.read_head().weight)
