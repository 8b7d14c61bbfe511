"""A file system that is really full: a small one, where this machine lets a user mount one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_teachers import make_config, make_llama, make_rows, read_files, save_teacher, write_rows

from stages.cache_teacher import cache_teacher

ROOT = Path(__file__).parents[1]
MOUNT = ["unshare", "--user", "--map-root-user", "--mount"]
SCRIPT = """
mount -t tmpfs -o size=160k small {mount} || exit 9
{stage} > {root}/full.txt 2>&1; echo $? >> {root}/full.txt
mount -o remount,size=64m {mount}
{stage} > {root}/again.txt 2>&1; echo $? >> {root}/again.txt
cp -r {mount}/cache {root}/found
"""


@pytest.mark.skipif("STILLROOM_LONG" not in os.environ, reason="takes a minute: make torture")
def test_a_capture_on_a_full_file_system_goes_on_once_there_is_room(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    teacher = save_teacher(tmp_path / "teacher", make_llama())
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(60))
    whole = make_config(tmp_path / "whole", teacher, rows, targets={"top_k": "all"})
    cache_teacher(whole, progress=False)
    mount = tmp_path / "small"
    mount.mkdir()
    config = whole.model_copy(update={"output": mount / "cache"})
    file = tmp_path / "cache.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    stage = f"{sys.executable} -m stages.cli cache-teacher {file}"
    script = SCRIPT.format(mount=mount, root=tmp_path, stage=stage)
    done = subprocess.run([*MOUNT, "sh", "-c", script], cwd=ROOT, capture_output=True, check=False)
    if not (tmp_path / "full.txt").is_file():
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode()}")
    told = (tmp_path / "full.txt").read_text(encoding="utf-8")
    assert "No space left on device" in told and "again to continue\n1\n" in told, told
    assert (tmp_path / "again.txt").read_text(encoding="utf-8").endswith("\n0\n")
    assert read_files(tmp_path / "found") == read_files(whole.output)
