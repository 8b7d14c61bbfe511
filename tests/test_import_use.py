"""An imported cache is a cache: it is inspected, split, learned from, and says what it lacks."""

import io
import resource
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from small_dumps import assert_says, import_files, save_tokenizer, say, write_lines
from test_import_refusals import K, make_rows
from test_independent_reader import require_same_reading
from typer.testing import CliRunner

from pipeline.cache import TeacherCache
from pipeline.errors import MismatchError, StillroomError
from pipeline.runs import read_result
from pipeline.storage import as_path
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.cli import app
from stages.export_cache import export_cache
from stages.inspect import inspect
from stages.train_student import StudentConfig, train_student

COUNT = 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    folder = tmp_path_factory.mktemp("imported")
    rows = [{**row, "language": f"l{n % 2}"} for n, row in enumerate(make_rows(COUNT))]
    rows[3]["logprobs"][2], rows[3]["target_token_ids"][2] = [-0.5], [7]  # a short row
    files = {
        "train": write_lines(folder / "a.jsonl", rows[:8]),
        "test": write_lines(folder / "b.jsonl", rows[8:]),
    }
    return import_files(folder, "axolotl", files, carry=["language"])


def train(cache: TeacherCache, output: Path, losses: list[dict[str, object]]) -> Path:
    settings = {
        "cache": str(cache.path),
        "output": str(output),
        "student": {"from": "scratch", "architecture": "llama", "layers": 1, "hidden_size": 16}
        | {"heads": 2, "intermediate_size": 24},
        "losses": losses,
        "training": {"per_device_train_batch_size": 4, "max_steps": 2, "use_cpu": True},
        "evaluation": {"split": "test"},
    }
    return train_student(StudentConfig.model_validate(settings))


def test_files_name_the_splits_and_columns_are_carried(cache: TeacherCache) -> None:
    assert (len(cache.split_indices("train")), len(cache.split_indices("test"))) == (8, 4)
    assert list(cache.group("language")) == ["l0", "l1"]
    assert_says(cache, 9, say(9), K, 1e-5)


def test_a_reader_written_from_the_page_reads_short_rows(cache: TeacherCache) -> None:
    assert (cache[3].targets.logits[2] == -torch.inf).sum() == K - 1
    require_same_reading(cache.path)


def test_a_student_learns_from_it(cache: TeacherCache, tmp_path: Path) -> None:
    losses = [{"name": "forward_kl"}, {"name": "reverse_kl"}, {"name": "ranking"}]
    result = read_result(train(cache, tmp_path / "run", [*losses, {"name": "cross_entropy"}]))
    assert result.metric("loss") is not None
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "Its teacher is somebody/teacher, whose answers were computed once" in card


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({"name": "forward_kl", "temperature": 2.0}, "asks for temperature 2, .* holds 1;"),
        ({"name": "hidden_mse", "layers": {0: 0}}, r"has no hidden states 'layer\.0'"),
        ({"name": "hidden_mse", "pooled": True}, "has no hidden states 'pooled'"),
        ({"name": "dense_kl"}, "keeps no output head"),
    ],
    ids=["temperature", "layer", "pooled", "head"],
)
def test_what_a_dump_does_not_hold_is_refused(
    cache: TeacherCache, tmp_path: Path, loss: dict[str, object], reason: str
) -> None:
    with pytest.raises(StillroomError, match=reason):
        train(cache, tmp_path / "run", [loss])


def test_inspect_shows_where_it_is_from(cache: TeacherCache) -> None:
    text = io.StringIO()
    inspect(cache.path, console=Console(file=text, width=200))
    shown = text.getvalue()
    assert "imported" in shown
    assert "axolotl" in shown
    assert "somebody/teacher" in shown
    inspect(cache.path, "a:3", Console(file=text, width=200))


def test_some_of_one_file_is_held_out_by_id(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", make_rows(40))
    cache = import_files(tmp_path, "axolotl", file, held_out={"test": 0.2, "validation": 0.1})
    counts = {split: len(cache.split_indices(split)) for split in ("train", "validation", "test")}
    assert sum(counts.values()) == 40
    assert counts["train"] > counts["test"] > 0
    assert counts["validation"] > 0
    again = import_files(
        tmp_path / "again", "axolotl", file, held_out={"test": 0.2, "validation": 0.1}
    )
    assert again.manifest.digest == cache.manifest.digest


def test_what_was_imported_stays_so_through_another_export(tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[2]["logprobs"] = rows[2]["target_token_ids"] = []  # nothing was said of this text
    file = write_lines(tmp_path / "dump.jsonl", rows)
    first = import_files(tmp_path, {"name": "axolotl", "temperature": 2.0}, file)
    for format in ("parquet", "jsonl"):
        plain = export_cache(first.path, format, tmp_path / f"plain.{format}")
        second = import_files(tmp_path / format, "stillroom", str(plain))
        assert [len(second[row].targets) for row in range(4)] == [23, 23, 0, 23]
        imported, before = second.manifest.imported, first.manifest.imported
        assert imported is not None and before is not None
        *unknown, bounds = imported.not_known
        assert (imported.temperature, unknown) == (2.0, before.not_known)
        assert f"{before.rows['labels_bounded']} of {before.rows['labels']} labels" in bounds
        assert imported.origin is not None
        assert imported.origin["cache"] == first.manifest.digest
        assert imported.origin["imported"] == before.model_dump(mode="json")


def test_a_teacher_is_not_asked_into_an_imported_cache(cache: TeacherCache) -> None:
    settings = {
        "output": str(cache.path),
        "task": "causal-lm",
        "data": {"source": "json", "files": "texts.jsonl"},
        "teacher": {"model": "somebody/teacher"},
    }
    with pytest.raises(MismatchError, match="was begun by another command"):
        cache_teacher(CacheConfig.model_validate(settings), progress=False)


@pytest.mark.parametrize(
    "command",
    [["verify", "--teacher", "somebody/teacher"], ["add-signal", "--set", "hidden.layers=[1]"]],
    ids=["verify", "add-signal"],
)
def test_nobody_asks_the_teacher_of_a_dump_again(
    cache: TeacherCache, tmp_path: Path, command: list[str]
) -> None:
    name, *options = command
    folders = [str(cache.path), *([str(tmp_path / "out")] if name == "add-signal" else [])]
    done = CliRunner().invoke(app, [name, *folders, *options])
    assert isinstance(done.exception, StillroomError)
    assert "its targets were imported (axolotl" in str(done.exception)


def test_a_disk_that_refuses_is_told_in_one_line_and_gone_on_from(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", make_rows(40))
    whole = import_files(tmp_path, "axolotl", file, shard_tokens=480)
    again = tmp_path / "again"
    save_tokenizer(again / "tokenizer")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StillroomError, match=r"cannot be (used|written) .* safe, make room"):
            import_files(again, "axolotl", file, shard_tokens=480)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = import_files(again, "axolotl", file, shard_tokens=480)
    assert found.manifest.digest == whole.manifest.digest


def test_a_view_of_it_is_exported_like_a_cache(cache: TeacherCache, tmp_path: Path) -> None:
    for command in (
        ["select", str(cache.path), str(tmp_path / "view"), "--where", "language=l1"],
        ["export", str(tmp_path / "view"), "--output", str(tmp_path / "plain.parquet")],
    ):
        assert CliRunner().invoke(app, command).exit_code == 0
    table = parquet.read_table(tmp_path / "plain.parquet")
    assert set(table["language"].to_pylist()) == {"l1"}
    assert len(table) == COUNT // 2


def test_a_store_takes_an_import_and_gives_an_export(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", make_rows())
    here = import_files(tmp_path, "axolotl", file)
    there = import_files(tmp_path, "axolotl", file, output="memory://imports/cache")
    assert there.manifest.digest == here.manifest.digest
    plain = export_cache(there.path, output=tmp_path / "plain.parquet")
    assert parquet.read_metadata(plain).num_rows == 3
    again = "memory://imports/again.parquet"
    done = CliRunner().invoke(app, ["export", str(here.path), "--output", again])
    assert done.exit_code == 0 and as_path(again).read_bytes() == plain.read_bytes()


def test_fewer_entries_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", make_rows())
    cache = import_files(tmp_path, "axolotl", file, top_k=3, codec="steps")
    assert cache.manifest.targets.codec.name == "steps"
    assert_says(cache, 0, say(0), 3, 0.2)


def test_the_command_imports_a_config(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", make_rows())
    import_files(tmp_path, "axolotl", file)
    done = CliRunner().invoke(
        app,
        ["import", str(tmp_path / "cache" / "config.yaml"), "--set", f"output={tmp_path / 'two'}"],
    )
    assert done.exit_code == 0, done.output
    assert "3 examples, 69 targets" in done.output
    first, second = (TeacherCache.open(tmp_path / name) for name in ("cache", "two"))
    assert first.manifest.digest == second.manifest.digest
