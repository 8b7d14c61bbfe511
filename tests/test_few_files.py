"""Too many open files: told in one line with the limit to raise, and nothing finished is harmed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from few_files import few_files
from small_runs import make_language_cache, make_student_config
from small_teachers import (
    make_config,
    make_llama,
    make_rows,
    read_files,
    save_teacher,
    write_rows,
)

from pipeline.errors import StillroomError
from pipeline.locking.owners import Owner, Witness
from pipeline.storage import writing_folder
from stages.cache_teacher import cache_teacher
from stages.train_student import train_student

REMEDY = r"Too many open files.* allow more open files \(ulimit -n\) and run the same command again"


def starve(stage: Callable[[], object]) -> list[str]:
    """What a stage says with ever more files that it may open, until it ends."""
    told: list[str] = []
    while True:
        try:
            with few_files(len(told)):
                stage()
            return told
        except StillroomError as error:
            told.append(str(error))


def test_a_capture_names_the_limit_and_goes_on_from_what_is_safe(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_llama())
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    settings = {"hidden": {"layers": [-1]}, "shard": {"examples": 4}}
    whole, starved = (
        make_config(tmp_path / name, teacher, rows, **settings) for name in ("whole", "starved")
    )
    cache_teacher(whole, progress=False)
    cache_teacher(starved, progress=False, shard_range="0:1")
    shard = starved.output / "shards/00000/shard.json"
    written = shard.stat().st_ino
    told = starve(lambda: cache_teacher(starved, progress=False))
    assert all(re.search(REMEDY, line) for line in told), told
    assert any("cannot be written" in line and "1 of 4 shards are safe" in line for line in told), (
        told
    )
    assert shard.stat().st_ino == written
    assert read_files(whole.output) == read_files(starved.output)


def test_a_training_names_the_limit_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    cache = make_language_cache(tmp_path)
    whole, starved = (make_student_config(cache, tmp_path / name) for name in ("whole", "starved"))
    train_student(whole)
    told = starve(lambda: train_student(starved))
    assert told and all(re.search(REMEDY, line) for line in told), told
    one, other = (config.output / "model.safetensors" for config in (whole, starved))
    assert one.read_bytes() == other.read_bytes()


def test_whoever_may_open_no_file_takes_nobody_for_dead() -> None:
    owner, witness = Owner("feedfacefeedface", "cache-teacher", shared=False), Witness()
    assert witness.is_alive(owner)
    with few_files(0), pytest.raises(OSError, match="Too many open files"):
        witness.is_alive(owner)


def test_a_folder_that_cannot_be_emptied_is_not_taken_for_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(OSError, match="Too many open files")
    with few_files(0), refused, writing_folder(tmp_path):
        pytest.fail("it still holds the file")
