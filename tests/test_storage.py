"""Files and folders are whole or not there, on a disk, in memory and in a store that fails."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_relay import FAULTS, Rule
from small_store import STORES, find_place

from pipeline.errors import ConfigError, StoreError
from pipeline.storage import (
    RangeReader,
    as_folder,
    as_path,
    create_object,
    list_files,
    reading,
    remove_file,
    remove_tree,
    write_bytes,
    writing,
    writing_folder,
)

CONTENT = random.Random(0).randbytes(50_000)
SHARD = {"rows": CONTENT, "arrays/a": b"a" * 10, "arrays/b": b"b" * 20, "last": b"{}"}


@pytest.fixture(autouse=True)
def _near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "near"))


@pytest.fixture(params=["disk", *STORES])
def place(request, tmp_path) -> Path:
    """An empty folder of each kind."""
    if request.param == "disk":
        return tmp_path / "cache"
    return as_path(find_place(request.param, request))


def fill(folder: Path, files: dict[str, bytes] = SHARD) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_shard(path: Path) -> None:
    with writing_folder(path, last="last") as folder:
        fill(folder)


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in list_files(path)}


def test_files_are_written_listed_read_and_removed(place):
    write_bytes(place / "a/b.json", CONTENT)
    with writing(place / "c") as draft:
        draft.write_bytes(b"more")
    assert list_files(place) == {"a/b.json": len(CONTENT), "c": 4}
    assert (place / "c").is_file() and not (place / "d").exists()
    assert sorted(path.name for path in place.iterdir()) == ["a", "c"]
    assert (place / "a/b.json").stat().st_size == len(CONTENT)
    with reading(place / "a/b.json") as local:
        assert local.read_bytes() == CONTENT
    with (place / "a/b.json").open("rb") as opened:
        opened.seek(100)
        assert opened.read(50) == CONTENT[100:150]
    remove_file(place / "c")
    remove_file(place / "c")
    assert list_files(place) == {"a/b.json": len(CONTENT)}
    remove_tree(place)
    remove_tree(place)
    assert list_files(place) == {}


def test_a_file_whose_writing_breaks_off_is_what_it_was(place):
    write_bytes(place / "file", b"old")
    with pytest.raises(KeyError), writing(place / "file") as draft:
        draft.write_bytes(b"half")
        raise KeyError
    assert (place / "file").read_bytes() == b"old"


def test_a_folder_takes_the_place_of_another(place):
    with writing_folder(place / "0", last="last") as folder:
        fill(folder, {"other": b"1", "last": b"2"})
    write_shard(place / "0")
    assert contents(place / "0") == SHARD


@pytest.mark.parametrize("stands", [True, False])
def test_a_folder_that_others_made_meanwhile_stays_where_it_is_whole(tmp_path, stands):
    place, drafts = tmp_path / "0", tmp_path / "drafts"
    (drafts / "0.left").mkdir(parents=True)  # by who was killed
    with writing_folder(place, "last", drafts, lambda: stands) as folder:
        fill(folder)
        fill(place, {"other": b"1"})
        assert list(drafts.iterdir()) == [folder]
    assert contents(place) == ({"other": b"1"} if stands else SHARD)
    assert list(drafts.iterdir()) == []


def test_a_folder_whose_filling_breaks_off_is_what_it_was(tmp_path):
    place, drafts = tmp_path / "0", tmp_path / "drafts"
    fill(place)
    with pytest.raises(KeyError), writing_folder(place, "last", drafts) as folder:
        fill(folder, {"other": b"1"})
        raise KeyError
    assert contents(place) == SHARD and list(drafts.iterdir()) == []


def test_parts_of_a_file_are_read_and_its_end_is_told(place):
    write_bytes(place / "file", CONTENT)
    for version in (None, "digest"):
        reader = RangeReader(place / "file", version)
        assert bytes(reader.read(10, 100)) == CONTENT[10:110]
        with pytest.raises((OSError, StoreError)):
            reader.read(len(CONTENT) - 10, 20)


@pytest.mark.parametrize("kind", STORES)
def test_of_many_that_create_an_object_one_succeeds(request, kind):
    place = as_path(find_place(kind, request))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: create_object(place / "a", b"%d" % n), range(8)))
    assert found.count(True) == 1
    assert (place / "a").read_bytes() == b"%d" % found.index(True)


def test_to_create_an_object_is_one_request_where_puts_are_conditional(bucket):
    with bucket.store.broken():
        assert create_object(as_path(bucket.url) / "a", b"mine")
        assert not create_object(as_path(bucket.url) / "a", b"yours")
    asked = [served.method for served in bucket.store.served]
    assert asked == ["PUT", "PUT", "HEAD", "GET"]  # the second looks whose it is


@pytest.mark.parametrize("fault", ["lost-answer", "error", "cut-header"])
def test_whoever_created_an_object_knows_it_though_the_answer_was_lost(bucket, fault):
    with bucket.store.broken(Rule(fault, "PUT")):
        assert create_object(as_path(bucket.url) / "a", b"mine")
    assert not create_object(as_path(bucket.url) / "a", b"yours")
    assert bucket.contents() == {"a": b"mine"}


WRITING = [fault for fault in FAULTS if fault not in ("none", "silence", "crawl", "flip-bit")]


@pytest.mark.parametrize("fault", WRITING)
def test_any_request_of_a_folder_may_fail_and_it_is_whole_only_with_its_last_file(bucket, fault):
    """Once: it succeeds. For ever: one line, no `last`, nothing left here; the next succeeds."""
    path = as_path(bucket.url) / "0"
    whole = {f"0/{name}": content for name, content in SHARD.items()}
    with bucket.store.broken():
        write_shard(path)
        requests = len(bucket.store.served)
    for broken in range(requests):
        with bucket.store.broken(Rule(fault, after=broken)):
            write_shard(path)
        assert bucket.contents() == whole
    if fault not in ("error", "cut-upload"):
        return
    for broken in range(requests):
        with bucket.store.broken(Rule(fault, after=broken, times=None)):
            with pytest.raises(StoreError) as told:
                write_shard(path)
            assert "\n" not in str(told.value)
        left = bucket.contents()
        assert "0/last" not in left or left == whole
    assert list(local_staging().iterdir()) == []
    write_shard(path)
    assert bucket.contents() == whole


def local_staging() -> Path:
    return Path(os.environ["STILLROOM_CACHE_DIR"]) / "staging"


def test_an_object_that_is_short_in_the_list_is_not_taken_for_whole(bucket, monkeypatch):
    """A store that loses what it was given: it is asked for its list before `last` is sent."""
    path = as_path(bucket.url) / "0"
    real = path.fs.find

    def forgetful(*args, **kwargs):
        bucket.replace("0/rows", CONTENT[:100])
        return real(*args, **kwargs)

    monkeypatch.setattr(path.fs, "find", forgetful)
    with pytest.raises(StoreError, match=r"0/rows: has 100 bytes .* after 50000 were sent"):
        write_shard(path)
    assert "0/last" not in bucket.contents()


def _stage_for_ever(url: str, begun) -> None:
    with writing_folder(as_path(url) / "0", last="last") as folder:
        fill(folder)
        begun.set()
        time.sleep(600)


def test_what_a_killed_process_staged_is_removed_by_the_next(bucket):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=_stage_for_ever, args=(bucket.url, begun))
    process.start()
    assert begun.wait(300)
    with writing_folder(as_path(bucket.url) / "1", last="last") as folder:
        fill(folder)
        assert len(list(local_staging().glob("*.lock"))) == 2  # that of a living one is left alone
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert any(local_staging().iterdir())
    write_shard(as_path(bucket.url) / "1")
    assert list(local_staging().iterdir()) == []
    assert set(bucket.contents()) == {f"1/{name}" for name in SHARD}


def _read_in_child(path: Path, found) -> None:
    found.send_bytes(
        bytes(RangeReader(path, "digest").read(5, 10)) + (path.parent / "file").read_bytes()
    )


def test_a_path_passes_a_fork(place):
    """The parent has threads and connections of its own; the child makes its own."""
    write_bytes(place / "file", CONTENT)
    reader = RangeReader(place / "file", "digest")
    reader.read_ahead([(100, 200)])
    context = multiprocessing.get_context("fork")
    found, sent = context.Pipe(duplex=False)
    process = context.Process(target=_read_in_child, args=(place / "file", sent))
    process.start()
    sent.close()  # so that nobody waits for a child that fails
    assert found.recv_bytes() == CONTENT[5:15] + CONTENT
    process.join()
    assert bytes(reader.read(100, 200)) == CONTENT[100:300]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("warp://somewhere", r"warp://somewhere: is no address of a store .*use a folder, s3://"),
        ("s3://", "is no address of a store"),
    ],
)
def test_addresses_that_cannot_be_opened_are_told(address, message):
    with pytest.raises(ConfigError, match=message):
        as_path(address)


@pytest.mark.parametrize(("kind", "package"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_a_store_whose_package_is_missing_is_told(kind, package):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=rf"{kind}:// is not installed .*; pip install {package}"):
        as_path(f"{kind}://place/cache")


def test_a_hub_that_cannot_be_reached_is_told():
    program = (
        "from pipeline.storage import as_path\n"
        "as_path('hf://datasets/somebody/caches/first/manifest.json').read_bytes()"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "STILLROOM_STORE_PATIENCE": "0.1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    told = done.stderr.splitlines()[-1]
    assert "StoreError: hf://datasets/somebody/caches/first/manifest.json: cannot be" in told
    assert "offline mode" in told and "tries in" in told


def test_addresses_of_every_kind_are_paths(tmp_path):
    assert as_path(str(tmp_path)) == tmp_path
    assert as_path(f"file://{tmp_path}") == tmp_path
    hub = as_path("hf://datasets/somebody/caches/first")
    assert str(hub / "manifest.json") == "hf://datasets/somebody/caches/first/manifest.json"
    assert str(as_path(hub).parent) == "hf://datasets/somebody/caches"


def test_a_home_is_found_where_no_shell_has_looked_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/caches/demo") == as_folder("~/caches/demo") == tmp_path / "caches" / "demo"
    for text in ("~no such user/x", "here/~", "s3://bucket/~/x"):
        assert str(as_path(text)) == text
