"""A teacher from the hub: its commit is kept beside the cache, its content decides."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_teachers import (
    make_config,
    make_llama,
    make_rows,
    read_files,
    save_teacher,
    write_rows,
)

from pipeline.errors import MismatchError
from stages.cache_teacher import cache_teacher

COMMITS = [digit * 40 for digit in "abc"]


def publish(store: Path, model: torch.nn.Module, commit: str) -> None:
    """What a download of `makers/small` leaves on this machine, with main at a commit."""
    repository = store / "models--makers--small"
    save_teacher(repository / "snapshots" / commit, model)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def test_the_commit_of_a_teacher_from_the_hub_is_kept_and_its_content_compared(
    hub: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", make_rows(8, 12))
    config = make_config(tmp_path, Path("makers/small"), data)
    publish(hub, make_llama(), COMMITS[0])
    cache_teacher(config, progress=False)
    before = read_files(config.output)
    log = json.loads((config.output / "capture.json").read_text(encoding="utf-8"))
    assert log["teacher_files"] == {"commit": COMMITS[0]}
    publish(hub, make_llama(), COMMITS[1])  # a new card, say
    cache_teacher(config, progress=False)
    pinned = {"model": "makers/small", "revision": COMMITS[0]}
    cache_teacher(make_config(tmp_path, Path(), data, teacher=pinned), progress=False)
    folder = shutil.copytree(hub, tmp_path / "copy") / "models--makers--small" / "snapshots"
    cache_teacher(make_config(tmp_path, folder / COMMITS[0], data), progress=False)
    assert read_files(config.output) == before
    changed = make_llama()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    publish(hub, changed, COMMITS[2])
    with pytest.raises(MismatchError, match=r"cached with teacher\.digest"):
        cache_teacher(config, progress=False)
