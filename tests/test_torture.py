"""Whoever is killed, or meets a failing disk, at any instant loses nothing that was finished."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
POINTS = 10  # of each scene, by number, so that a seed repeats them; `make torture` takes times too
SCENES = ["stage one", "verify --repair", "stage two", "stage two, in stages"]


def test_stages_that_are_stopped_anywhere_go_on_to_the_same_bytes() -> None:
    scenes = [word for name in SCENES for word in ("--scene", name)]
    command = [sys.executable, "-m", "tests.torture", "--points", str(POINTS), "--timed", "0"]
    done = subprocess.run(
        [*command, *scenes], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^torture: (.*?): (\d+) kill points .*, (\d+) errors", done.stdout, re.M)
    assert [name for name, _, _ in found] == SCENES
    assert all(int(kills) + int(errors) >= POINTS for _, kills, errors in found), done.stdout
