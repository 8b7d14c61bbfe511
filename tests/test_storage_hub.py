"""Caches in a repository of a hub: what differs there from other stores."""

import random

import pytest
from small_hub import SmallHub

from pipeline.errors import StoreError
from pipeline.storage import RangeReader, as_path, list_files, read_small, write_bytes

CONTENT = random.Random(0).randbytes(50_000)
FOLDER = "hf://datasets/me/caches/first"


def test_a_part_of_a_file_costs_its_own_bytes(hub: SmallHub) -> None:
    hub.files["me/caches"] = {"first/rows": CONTENT}
    reader = RangeReader(as_path(FOLDER) / "rows")
    assert bytes(reader.read(20_000, 100)) == CONTENT[20_000:20_100]
    assert bytes(reader.read(0, 7)) == CONTENT[:7]
    assert hub.sent == 107


def test_what_others_commit_is_seen_at_once(hub: SmallHub) -> None:
    folder = as_path(FOLDER)
    hub.files["me/caches"] = {"first/a": b"old"}
    assert list_files(folder) == {"a": 3} and read_small(folder / "a") == b"old"
    assert not (folder / "b").exists()
    hub.files["me/caches"] |= {"first/a": b"newer", "first/b": b""}
    assert list_files(folder) == {"a": 5, "b": 0} and read_small(folder / "a") == b"newer"
    assert (folder / "b").is_file() and (folder / "a").stat().st_size == 5


def test_a_commit_that_another_came_before_is_sent_again(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_STORE_PATIENCE", "0.1")
    hub.files["me/caches"] = {}
    hub.rivals = 2
    write_bytes(as_path(FOLDER) / "a", b"mine")
    assert hub.files["me/caches"] == {"first/a": b"mine"} and hub.rivals == 0


def test_a_repository_that_does_not_exist_is_told_and_not_made(hub: SmallHub) -> None:
    none = as_path("hf://datasets/me/none/first")
    assert list_files(none) == {}
    with pytest.raises(StoreError, match=r"repository does not exist.*; create it first"):
        write_bytes(none / "a", b"1")
    assert hub.files == {}
