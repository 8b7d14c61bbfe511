"""A cache as plain columns: all that its records say, readable by whoever reads Parquet or JSON."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from cache_examples import SIGNALS, make_draft, make_example, write_cache
from pyarrow import parquet
from typer.testing import CliRunner

from pipeline.cache import TargetsSpec, TeacherCache
from pipeline.errors import ConfigError, StillroomError
from stages.cli import app
from stages.export_cache import export_cache

COUNT = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    folder = tmp_path_factory.mktemp("caches") / "small"
    write_cache(folder, make_draft(COUNT, signals=SIGNALS))
    return TeacherCache.open(folder)


def read_rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        return rows
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def rows(
    cache: TeacherCache, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("plain") / f"out.{request.param}"
    return read_rows(export_cache(cache.path, request.param, file, hidden=True))


def test_every_example_is_there_with_its_tokens_and_columns(
    cache: TeacherCache, rows: list[dict[str, Any]]
) -> None:
    assert len(rows) == COUNT
    for number, row in enumerate(rows):
        example = cache[number]
        assert row["example_id"] == example.example_id
        assert (row["split"], row["weight"]) == tuple(example.columns.values())
        for name in ("input_ids", "segment_lengths", "target_positions", "label_ids"):
            assert row[name] == getattr(example, name).tolist(), name


def test_every_cached_temperature_follows_from_the_columns(
    cache: TeacherCache, rows: list[dict[str, Any]]
) -> None:
    for number, row in enumerate(rows):
        targets = cache[number].targets
        log_probs, ids = torch.tensor(row["log_probs"]), torch.tensor(row["ids"])
        logsumexp = torch.tensor(row["logsumexp"])
        logits = log_probs + logsumexp[:, :1]
        assert (log_probs.diff(dim=1) <= 0).all()
        for column, temperature in enumerate(targets.temperatures):
            expected = targets.at(temperature)
            dense = torch.zeros(len(targets), 50).scatter(1, expected.ids, expected.log_probs)
            found = logits / temperature - logsumexp[:, column, None]
            torch.testing.assert_close(found, dense.gather(1, ids), atol=2e-6, rtol=0)
        kept = torch.tensor(row["kept_mass"])
        torch.testing.assert_close(1 - kept, targets.at(1.0).tail_mass, atol=2e-6, rtol=0)
        drawn = torch.tensor(row["draw_ids"]).sort(dim=1).values
        assert torch.equal(drawn, targets.draw_ids.long().sort(dim=1).values)


def test_hidden_states_and_labels_are_the_very_numbers(
    cache: TeacherCache, rows: list[dict[str, Any]]
) -> None:
    for number, row in enumerate(rows):
        example = cache[number]
        said = torch.tensor(row["label_log_probs"])
        assert torch.equal(said, example.targets.label_log_probs)
        for name in SIGNALS:
            assert torch.equal(torch.tensor(row[f"hidden.{name}"]), example.hidden[name]), name


def test_a_parquet_file_says_what_it_was_made_from(cache: TeacherCache, tmp_path: Path) -> None:
    file = export_cache(cache.path, "parquet", tmp_path / "out.parquet")
    schema = parquet.read_schema(file)
    facts = json.loads(schema.metadata[b"stillroom"])
    assert facts["identity"] == cache.manifest.identity.model_dump(mode="json")
    assert (facts["num_classes"], facts["shifted"]) == (50, True)
    assert facts["targets"]["temperatures"] == [1.0, 2.0]
    assert facts["cache"] == cache.manifest.digest
    assert not any(name.startswith("hidden") for name in schema.names)


def test_lines_of_json_have_the_same_facts_beside_them(cache: TeacherCache, tmp_path: Path) -> None:
    export_cache(cache.path, "parquet", tmp_path / "a.parquet")
    export_cache(cache.path, "jsonl", tmp_path / "a.jsonl")
    beside = json.loads((tmp_path / "a.jsonl.manifest.json").read_text(encoding="utf-8"))
    inside = parquet.read_schema(tmp_path / "a.parquet").metadata[b"stillroom"]
    assert beside == json.loads(inside)


def test_a_carried_column_with_a_name_of_ours_is_renamed(tmp_path: Path) -> None:
    draft = make_draft(2, columns={"ids": "string"})
    examples = [
        replace(make_example(row, make_draft(2)), columns={"ids": f"mine {row}"})
        for row in range(2)
    ]
    write_cache(tmp_path / "cache", draft, examples)
    rows = read_rows(export_cache(tmp_path / "cache", output=tmp_path / "out.parquet"))
    assert [row["carried.ids"] for row in rows] == ["mine 0", "mine 1"]


def test_large_examples_are_written_in_groups_of_few_entries(tmp_path: Path) -> None:
    targets = TargetsSpec(top_k="all", codec="lossless").resolve(30_000)
    draft = make_draft(3, targets=targets, num_classes=30_000)
    examples = [make_example(row, draft, tokens=20) for row in range(3)]
    write_cache(tmp_path / "cache", draft, examples)
    file = export_cache(tmp_path / "cache", output=tmp_path / "out.parquet")
    content = parquet.ParquetFile(file)
    assert content.num_row_groups == 3  # 19 targets of 30,000 ids and as many log-probabilities
    assert content.metadata.row_group(0).column(0).num_values == 1


def test_a_refusal_of_the_disk_leaves_nothing(cache: TeacherCache, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StillroomError, match="cannot be written"):
        export_cache(cache.path, output=tmp_path / "file" / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_broken_cache_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", make_draft(COUNT))
    rows = tmp_path / "cache" / "shards" / "00001" / "rows.arrow"
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    with pytest.raises(StillroomError, match="damaged"):
        export_cache(tmp_path / "cache", "jsonl", tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_stands_is_not_written_over(cache: TeacherCache, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_bytes(b"mine")
    with pytest.raises(StillroomError, match="stands already"):
        export_cache(cache.path, output=tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == b"mine"


def test_a_cache_is_exported_beside_itself_from_wherever_it_is_called(
    cache: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cache.path, tmp_path / "here")
    for folder, named in (("here", "."), ("here/shards", ".."), (".", "here")):
        monkeypatch.chdir(tmp_path / folder)
        file = export_cache(Path(named), "jsonl")
        assert file.resolve() == tmp_path / "here.jsonl"
        file.unlink()


def test_a_format_for_students_is_none_for_a_cache(cache: TeacherCache) -> None:
    with pytest.raises(ConfigError, match="choose from jsonl, parquet"):
        export_cache(cache.path, "onnx")


def test_the_command_tells_a_cache_from_a_run(cache: TeacherCache, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["export", str(cache.path), "--output", str(tmp_path / "out.parquet")]
    )
    assert done.exit_code == 0, done.output
    assert f"{COUNT} examples" in done.output
    assert isinstance(parquet.read_table(tmp_path / "out.parquet"), pa.Table)
    refused = CliRunner().invoke(app, ["export", str(cache.path), "--dtype", "bfloat16"])
    assert isinstance(refused.exception, ConfigError)
    assert "leave out --dtype" in str(refused.exception)
