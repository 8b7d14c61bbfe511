"""Our own plain files come back as the same records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_examples import make_draft, make_example, write_cache
from small_dumps import V, import_files, save_tokenizer

from pipeline.cache import TargetsSpec, TeacherCache
from pipeline.cache.manifest import Draft
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.runs import write_json
from stages.export_cache import export_cache

COUNT = 10


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TeacherCache, TeacherCache]:
    folder = tmp_path_factory.mktemp("plain")
    targets = TargetsSpec(top_k=12, tail_draws=4, temperatures=(1.0, 2.0), codec="lossless")
    write_cache(folder / "first", make_draft(COUNT, targets=targets, num_classes=V))
    file = export_cache(folder / "first", request.param, folder / f"dump.{request.param}")
    second = import_files(folder, "stillroom", str(file), shard_tokens=20)
    return TeacherCache.open(folder / "first"), second


def test_every_entry_comes_back(pair: tuple[TeacherCache, TeacherCache]) -> None:
    first, second = pair
    assert list(first.ids()) == list(second.ids())
    assert second.manifest.num_shards > 1
    for row in range(COUNT):
        ours, theirs = first[row], second[row]
        assert ours.columns == theirs.columns
        for name in ("input_ids", "segment_lengths", "target_positions", "label_ids"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.targets.label_log_probs, theirs.targets.label_log_probs)
        for temperature in (1.0, 2.0):
            one, other = ours.targets.at(temperature), theirs.targets.at(temperature)
            for ids, values in (("ids", "log_probs"), ("draw_ids", "draw_log_probs")):
                order, same = (getattr(side, ids).sort(dim=1, stable=True) for side in (one, other))
                assert torch.equal(order.values, same.values)
                torch.testing.assert_close(
                    getattr(one, values).gather(1, order.indices),
                    getattr(other, values).gather(1, same.indices),
                    atol=4e-6,
                    rtol=0,
                )
            torch.testing.assert_close(one.tail_mass, other.tail_mass, atol=4e-6, rtol=0)


def test_the_manifest_says_that_it_was_imported(pair: tuple[TeacherCache, TeacherCache]) -> None:
    first, second = (cache.manifest for cache in pair)
    assert first.imported is None
    assert second.imported is not None
    assert second.imported.format == {"name": "stillroom"}
    assert (second.task, second.targets.temperatures) == (first.task, first.targets.temperatures)
    assert second.columns == first.columns


def test_importing_again_keeps_what_stands(tmp_path: Path) -> None:
    write_cache(tmp_path / "first", make_draft(COUNT, num_classes=V))
    file = export_cache(tmp_path / "first", output=tmp_path / "dump.parquet")
    cache = import_files(tmp_path, "stillroom", str(file), shard_tokens=20)
    digest = cache.manifest.digest
    before = {path: path.stat().st_mtime_ns for path in cache.path.glob("shards/*/*")}
    assert import_files(tmp_path, "stillroom", str(file), shard_tokens=20).manifest.digest == digest
    assert before == {path: path.stat().st_mtime_ns for path in cache.path.glob("shards/*/*")}


def test_an_interrupted_import_continues_to_the_same_bytes(tmp_path: Path) -> None:
    write_cache(tmp_path / "first", make_draft(COUNT, num_classes=V))
    file = export_cache(tmp_path / "first", output=tmp_path / "dump.parquet")
    cache = import_files(tmp_path, "stillroom", str(file), shard_tokens=20)
    whole = {path: path.read_bytes() for path in cache.path.rglob("*") if path.is_file()}
    draft = cache.manifest.model_dump(mode="json", include=set(Draft.model_fields))
    (cache.path / "manifest.json").unlink()
    write_json(cache.path / "draft.json", draft)
    (cache.path / "shards" / "00001" / "shard.json").unlink()
    import_files(tmp_path, "stillroom", str(file), shard_tokens=20)
    assert whole == {path: path.read_bytes() for path in cache.path.rglob("*") if path.is_file()}


def test_another_dump_is_not_mixed_in(tmp_path: Path) -> None:
    write_cache(tmp_path / "first", make_draft(COUNT, num_classes=V))
    write_cache(tmp_path / "second", make_draft(COUNT + 1, num_classes=V))
    files = [
        str(export_cache(tmp_path / name, output=tmp_path / f"{name}.jsonl", format="jsonl"))
        for name in ("first", "second")
    ]
    import_files(tmp_path, "stillroom", files[0])
    with pytest.raises(MismatchError, match=r"imported\.origin\.cache"):
        import_files(tmp_path, "stillroom", files[1])


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "first", make_draft(COUNT, num_classes=V))
    file = export_cache(tmp_path / "first", output=tmp_path / "dump.parquet")
    other = save_tokenizer(tmp_path / "other", V + 4)
    with pytest.raises(MismatchError, match="has 304 ids, the dump 300 classes"):
        import_files(tmp_path, "stillroom", str(file), tokenizer=other)


def test_draws_are_not_torn_from_their_entries(tmp_path: Path) -> None:
    write_cache(tmp_path / "first", make_draft(COUNT, num_classes=V))
    file = export_cache(tmp_path / "first", output=tmp_path / "dump.parquet")
    with pytest.raises(ConfigError, match="leave top_k out"):
        import_files(tmp_path, "stillroom", str(file), top_k=4)


def test_lines_without_their_facts_are_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "first", make_draft(COUNT, num_classes=V))
    file = export_cache(tmp_path / "first", "jsonl", tmp_path / "dump.jsonl")
    (tmp_path / "dump.jsonl.manifest.json").unlink()
    with pytest.raises(DataError, match=r"\.manifest\.json beside them"):
        import_files(tmp_path, "stillroom", str(file))


def test_an_example_that_stands_twice_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    draft = make_draft(2, num_classes=V)
    write_cache(tmp_path / "first", draft, [make_example(0, draft), make_example(1, draft)])
    file = export_cache(tmp_path / "first", output=tmp_path / "dump.parquet")
    again = tmp_path / "again.parquet"
    again.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="stands twice"):
        import_files(tmp_path, "stillroom", [str(file), str(again)])
    assert not (tmp_path / "cache" / "shards").exists()


def test_a_record_that_holds_less_than_k_is_padding_that_says_so(tmp_path: Path) -> None:
    draft = make_draft(2, num_classes=V, targets=TargetsSpec(top_k=6, codec="lossless"))
    write_cache(tmp_path / "first", draft)
    file = export_cache(tmp_path / "first", "jsonl", tmp_path / "dump.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kept = len(rows[0]["ids"][0]) - 4
    rows[0]["ids"][0], rows[0]["log_probs"][0] = (
        rows[0]["ids"][0][:kept],
        rows[0]["log_probs"][0][:kept],
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cache = import_files(tmp_path, "stillroom", str(file))
    targets = cache[0].targets
    assert targets.ids.shape[1] == 6
    assert targets.ids[0].unique().numel() == 6
    assert (targets.logits[0] == -torch.inf).sum() == 4
    distribution = targets.at(1.0)
    held = distribution.log_probs[0].exp()
    torch.testing.assert_close(distribution.tail_mass[0], 1 - held.sum())
    assert cache.manifest.imported is not None
    assert cache.manifest.imported.rows["entries"] == [2, 6]
    again = export_cache(cache.path, "jsonl", tmp_path / "again.jsonl")
    assert (
        json.loads(again.read_text(encoding="utf-8").splitlines()[0])["ids"][0] == rows[0]["ids"][0]
    )
    with pytest.raises(ConfigError, match="codec to lossless"):
        import_files(tmp_path / "other", "stillroom", str(file), codec="steps")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plain_version": 2}, "plain columns 2, this Stillroom reads 1; update"),
        ({"targets": None}, "targets: .*; export the cache again"),
        ({"targets": {"temperatures": ["hot"]}}, "targets.temperatures.0: .*found 'hot'"),
        ({"columns": ["language"]}, "columns: "),
        ({"num_classes": -1}, "num_classes: "),
        ({"imported": "from somebody"}, "imported: "),
        ({"task": {"name": "juggling"}}, "is of task 'juggling'; choose from causal-lm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_strangers_file_says_of_its_cache_is_checked(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    write_cache(tmp_path / "first", make_draft(2, num_classes=V))
    file = export_cache(tmp_path / "first", "jsonl", tmp_path / "dump.jsonl")
    facts = tmp_path / "dump.jsonl.manifest.json"
    whole = json.loads(facts.read_text(encoding="utf-8"))
    write_json(facts, whole | changes)
    with pytest.raises(DataError, match=said):
        import_files(tmp_path, "stillroom", str(file))
    facts.write_text("[1]", encoding="utf-8")
    with pytest.raises(DataError, match="does not say what cache it was exported from"):
        import_files(tmp_path, "stillroom", str(file))
