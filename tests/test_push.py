"""Students sent to a hub: what is listed is what arrives, and every failure is one line."""

from io import StringIO
from pathlib import Path

import huggingface_hub.constants
import pytest
from rich.console import Console
from small_hub import SmallHub
from small_runs import make_language_cache, make_student_config
from typer.testing import CliRunner

from pipeline.errors import StillroomError
from pipeline.export import list_upload, push
from stages.cli import app
from stages.export import export, publish
from stages.train_student import train_student


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    return train_student(make_student_config(make_language_cache(root), root / "run"))


def publish_to(folder: Path, name: str, dry_run: bool = False) -> str:
    """What publishing prints."""
    shown = StringIO()
    publish(folder, name, True, dry_run, Console(width=100, file=shown))
    return shown.getvalue()


def test_what_is_listed_arrives_byte_by_byte(run: Path, hub: SmallHub, tmp_path: Path) -> None:
    folder = export(run, "int8", tmp_path / "out", repository="me/tiny").folder
    shown = publish_to(folder, "me/tiny")
    assert hub.created[0]["name"] == "tiny" and "private" in str(hub.created[0])
    sent = hub.files["me/tiny"]
    assert set(sent) == set(list_upload(folder))
    for path, content in sent.items():
        assert (folder / path).read_bytes() == content
        assert path in shown and f"{len(content):,}" in shown
    assert "sent: " in shown


def test_a_dry_run_lists_and_sends_nothing(run: Path, hub: SmallHub, tmp_path: Path) -> None:
    folder = export(run, output=tmp_path / "out").folder
    shown = publish_to(folder, "me/tiny", dry_run=True)
    assert all(path in shown for path in list_upload(folder))
    assert "dry run" in shown and not hub.created and not hub.files


def test_a_wrong_token_is_one_line(
    run: Path, hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    (tmp_path / "README.md").write_text("# x", encoding="utf-8")
    with pytest.raises(StillroomError, match="401") as error:
        push(tmp_path, "me/tiny")
    assert "\n" not in str(error.value) and "hf auth login" in str(error.value)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_small")
    with pytest.raises(StillroomError, match="--push me/tiny") as error:
        push(tmp_path, "me/tiny")
    assert "\n" not in str(error.value)


def test_the_command_exports_and_lists(run: Path, tmp_path: Path) -> None:
    arguments = ["export", str(run), "--output", str(tmp_path / "out"), "--licence", "mit"]
    found = CliRunner().invoke(app, [*arguments, "--push", "me/tiny", "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "model.safetensors" in found.output and "nothing was sent" in found.output


def test_a_name_that_no_repository_can_have_is_refused_before_any_work(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(StillroomError, match="--push"):
        export(run, output=tmp_path / "out", repository="me/a/b")
    assert not (tmp_path / "out").exists()
