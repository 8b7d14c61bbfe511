"""Stores are asked again where they fail for a moment, and never where they have decided."""

import random
import socket

import pytest
from small_relay import FAULTS, Rule
from small_store import Bucket

from pipeline.errors import StoreError
from pipeline.storage.patience import PatientFiles

CONTENT = random.Random(0).randbytes(4096)


@pytest.fixture
def files(bucket: Bucket) -> PatientFiles:
    bucket.replace("folder/object", CONTENT)
    return PatientFiles("s3", {"use_listings_cache": False})


def do(files: PatientFiles, bucket: Bucket, action: str, tmp_path) -> object:
    """One operation on the object, and what it found."""
    root = bucket.url.removeprefix("s3://")
    at = f"{root}/folder/object"
    copy = tmp_path / "copy"
    if action == "look up":
        return files.info(at)["size"]
    if action == "list":
        return [entry["size"] for entry in files.find(root, detail=True).values()]
    if action == "read":
        return files.cat_file(at)
    if action == "read a range":
        return files.cat_file(at, start=1000, end=3000)
    if action == "open":
        with files.open(at, "rb") as opened:
            return opened.read()
    if action == "copy here":
        files.get_file(at, copy)
        return copy.read_bytes()
    if action == "write":
        files.pipe_file(at, CONTENT)
    elif action == "send":
        copy.write_bytes(CONTENT)
        files.put_file(copy, at)
    else:
        files.rm_file(at)
    return bucket.contents()


WHOLE = {"folder/object": CONTENT}
FOUND = {
    "look up": len(CONTENT),
    "list": [len(CONTENT)],
    "read": CONTENT,
    "read a range": CONTENT[1000:3000],
    "open": CONTENT,
    "copy here": CONTENT,
    "write": WHOLE,
    "send": WHOLE,
    "remove": {},
}


SLOW = {"silence", "crawl"}  # a second or two for each request
BROKEN = [
    (action, fault) for action in FOUND for fault in FAULTS if fault not in SLOW | {"flip-bit"}
]
BROKEN += [("look up", "silence"), ("read a range", "crawl"), ("write", "silence")]


@pytest.mark.parametrize(("action", "fault"), BROKEN)
def test_a_fault_of_one_request_is_overcome(files, bucket, tmp_path, monkeypatch, action, fault):
    """Of any request that the operation makes. A bit that is other is found by checksums."""
    if fault in SLOW:
        monkeypatch.setenv("STILLROOM_STORE_TIMEOUT", "0.5")
        monkeypatch.setenv("STILLROOM_STORE_PATIENCE", "30")  # a busy store may be as slow
    with bucket.store.broken():
        do(files, bucket, action, tmp_path)
        requests = len(bucket.store.served)
    for broken in range(requests):
        bucket.replace("folder/object", CONTENT)
        with bucket.store.broken(Rule(fault, after=broken)):
            assert do(files, bucket, action, tmp_path) == FOUND[action]


@pytest.mark.parametrize("action", FOUND)
def test_a_store_that_goes_on_failing_is_told_in_one_line(files, bucket, tmp_path, action):
    with bucket.store.broken(Rule("slow-down", times=None)):
        with pytest.raises(StoreError, match=r"cannot be .* \d tries") as told:
            do(files, bucket, action, tmp_path)
        tries = len(bucket.store.served)
    assert f"{tries} tries" in str(told.value)
    assert "run the same command again" in str(told.value)
    assert "\n" not in str(told.value)
    assert 3 <= tries <= 8


def test_a_store_that_is_silent_is_not_waited_for(files, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLROOM_STORE_TIMEOUT", "0.5")
    with (
        bucket.store.broken(Rule("silence", "GET", times=None)),
        pytest.raises(StoreError, match="3 tries"),
    ):
        do(files, bucket, "read a range", tmp_path)


def test_what_the_store_has_decided_is_not_asked_again(files, bucket, tmp_path):
    root = bucket.url.removeprefix("s3://")
    with bucket.store.broken():
        with pytest.raises(FileNotFoundError):
            files.cat_file(f"{root}/nothing", 0, 10)
        assert len(bucket.store.served) == 1
        with pytest.raises(StoreError, match=r"bucket.*does not exist\); create it first"):
            files.pipe_file("no-such-bucket/object", b"")
        assert len(bucket.store.served) == 2


def test_credentials_that_are_missing_are_named(files, bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fresh = PatientFiles("s3", {"use_listings_cache": False, "cache_regions": False})
    with pytest.raises(StoreError, match="check the credentials"):
        fresh.info(bucket.url.removeprefix("s3://"))


def test_a_store_that_is_not_there_is_told(bucket, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        files = PatientFiles("s3", {"endpoint_url": url})
        with pytest.raises(StoreError, match=r"s3://caches/a: cannot be looked up .* tries"):
            files.info("caches/a")


def test_a_length_of_time_that_is_none_is_refused(files, bucket, monkeypatch):
    monkeypatch.setenv("STILLROOM_STORE_PATIENCE", "soon")
    with pytest.raises(StoreError, match="STILLROOM_STORE_PATIENCE: 'soon' is no number"):
        files.info("caches/a")


def test_parts_of_a_large_upload_are_sent_again(files, bucket, tmp_path):
    """A file of three parts, of which each request is broken in turn."""
    large = tmp_path / "large"
    large.write_bytes(CONTENT * (9 * 2**10))  # 36 MiB
    at = bucket.url.removeprefix("s3://") + "/large"
    for fault, broken in [("cut-upload", 2), ("error", 0), ("lost-answer", 4)]:
        with bucket.store.broken(Rule(fault, path="large", after=broken)):
            files.put_file(large, at)
            assert any("partNumber=3" in served.path for served in bucket.store.served)
        assert len(bucket.contents()["large"]) == 36 * 2**20
        assert bucket.uploads() == 0


def test_an_upload_that_breaks_off_leaves_what_was_there(files, bucket, tmp_path):
    at = bucket.url.removeprefix("s3://") + "/folder/object"
    new = tmp_path / "new"
    new.write_bytes(CONTENT[::-1])
    with bucket.store.broken(Rule("cut-upload", "PUT", times=None)), pytest.raises(StoreError):
        files.put_file(new, at)
    assert bucket.contents() == {"folder/object": CONTENT}
