"""Whatever is put into a cache, reading it ends in one line or in data within bounds.

Longer: `python tests/fuzz.py --seconds 600` and `python tests/fuzz_guided.py --seconds 600`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from fuzz_mutations import change_json, mutate, read_files, reseal, write_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache import TeacherCache
from pipeline.errors import StillroomError

ROOT = Path(__file__).parents[1]


def run_child(*arguments: str) -> dict[str, int]:
    """What a fuzzer counted; a crash of its interpreter is a failure here and not ours."""
    found = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",  # what is covered, and so tried next, is the same every time
        },
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    counts: dict[str, int] = json.loads(found.stdout.splitlines()[-1])
    return counts


def test_caches_and_views_changed_at_random_are_refused_or_within_bounds() -> None:
    counts = run_child("tests/fuzz.py", "--seed", "1", "--inputs", "40", "--seconds", "540")
    assert counts["tried"] == 40 and counts["failed"] == 0
    assert counts["refused"] > 10 and counts["sealed"] > 20
    assert counts["peak_mib"] < 3000


def test_bytes_led_by_coverage_are_refused_or_within_bounds() -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or system")
    counts = run_child("tests/fuzz_guided.py", "--inputs", "1500", "--seconds", "540")
    assert counts["tried"] == 1500 and counts["read"] > 0
    assert counts["read"] + counts["refused"] == 1500


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("fuzz") / "cache"
    write_base(path)
    return path


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(random=st.randoms(use_true_random=False))
def test_a_manifest_changed_anywhere_is_one_line_or_a_manifest(base: Path, random: Random) -> None:
    file = base / "manifest.json"
    good = file.read_bytes()
    try:
        file.write_bytes(change_json(good, random))
        try:
            cache = TeacherCache.open(base)
            assert len(cache.manifest.digest) == 64
        except StillroomError as error:
            assert "\n" not in str(error)
    finally:
        file.write_bytes(good)


def test_a_mended_cache_is_the_one_that_was_mended(base: Path) -> None:
    """The attacker of these tests mends checksums well: an unchanged cache stays the same."""
    before = read_files(base)
    reseal(base)
    assert read_files(base) == before
    digest = TeacherCache.open(base).manifest.digest
    changed = next(
        c for seed in range(99) if "index/split.arrow" in (c := mutate(before, Random(seed)))
    )
    assert changed["index/split.arrow"] != before["index/split.arrow"]
    assert TeacherCache.open(base).manifest.digest == digest
