"""The command line: help with an example, and every mendable error as one line with exit code 1."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stages.cli import app, main

COMMANDS = [
    *("cache-teacher", "train-student", "train-teacher", "evaluate", "compare", "inspect"),
    "export",
    "import",
    *("sweep", "select", "filter", "merge", "extend", "add-signal"),
]


@pytest.fixture
def fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> object:
    """Run a command that must fail and return its one line."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["stillroom", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: stillroom {command}" in " ".join(result.output.replace("│", " ").split())


def test_a_config_that_is_neither_file_nor_shipped_gets_the_nearest_name(fail) -> None:  # type: ignore[no-untyped-def]
    assert "did you mean 'demo-kd'?" in fail("train-student", "demo-kdd")
    assert "cannot be read" in fail("cache-teacher", "missing.yaml")


def test_an_unknown_setting_gets_the_nearest_name(fail) -> None:  # type: ignore[no-untyped-def]
    assert "did you mean 'top_k'?" in fail("cache-teacher", "demo", "--set", "targets.topk=3")
    assert "did you mean 'forward_kl'?" in fail(
        "train-student", "demo-kd", "--set", "losses.0.name=forward_klx"
    )


def test_what_is_no_cache_or_run_is_said(fail, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "empty").mkdir()
    assert "is no cache" in fail("inspect", "empty")
    assert "no such folder" in fail("inspect", "nowhere")
    assert "no such folder" in fail("train-student", "demo-kd")
    assert "no such run" in fail("evaluate", "nowhere")
    assert "nowhere" in fail("compare", "nowhere")
    assert "empty: holds no finished run" in fail("evaluate", "empty")
    assert "empty: is no cache" in fail("export", "empty", "--format", "jsonl")
    assert "no such run" in fail("export", "nowhere")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-student", "demo-kd", "--set", "output=s3://bucket/run"],
        ["evaluate", "s3://bucket/run"],
        ["compare", "runs", "--output", "s3://bucket/report.html"],
        ["export", "empty", "--output", "memory://bucket/student"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_a_store_does_not_hold_is_not_written_beside_it(
    fail,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    arguments: list[str],
) -> None:
    assert "://bucket" in (said := fail(*arguments)) and "stores hold caches alone" in said
    assert not [*tmp_path.iterdir()]


def test_a_missing_teacher_and_missing_data_are_said(fail, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "data/teachers/demo" in fail("cache-teacher", "demo")
    found = fail(
        "train-teacher", "demo", "--set", "data.source=json", "--set", "data.files=gone.jsonl"
    )
    assert "gone.jsonl" in found
    (tmp_path / "rows.jsonl").write_text('{"content": "x"}\n', encoding="utf-8")
    wanted = ["data.source=json", "data.files=rows.jsonl", "data.splits={train: train}"]
    options = [part for setting in wanted for part in ("--set", setting)]
    assert "content" in fail("train-teacher", "demo", *options)
