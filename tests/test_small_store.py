"""The store that other tests break is itself sound: each fault is what its name says."""

import re
import time
from http.client import HTTPConnection

import pytest
from small_relay import FAULTS, Rule, SmallStore
from small_store import SIGNED, Bucket

CONTENT = bytes(range(256)) * 4
SEEN = {
    "none": "200, 1024 bytes",
    "error": "500",
    "slow-down": "503",
    "silence": "TimeoutError",
    "cut-upload": "ConnectionResetError",
    "lost-answer": "ConnectionResetError",
    "cut-header": "ConnectionResetError",
    "cut-body": "200, (ConnectionResetError|IncompleteRead)",
    "end-body": "200, IncompleteRead",
    "short-body": "200, 512 bytes",
    "flip-bit": "200, 1024 bytes, 1 other",
    "dribble": "200, 1024 bytes",
    "crawl": "(200, )?TimeoutError",
}
SILENT = ("silence", "crawl")


def read(store: SmallStore, path: str, patience: float) -> str:
    """What a client without retries sees of an object."""
    connection = HTTPConnection("127.0.0.1", store.server_port, timeout=patience)
    seen = []
    try:
        connection.request("GET", path, headers={"Authorization": SIGNED})
        response = connection.getresponse()
        seen.append(str(response.status))
        if response.status == 200:
            body = response.read()
            seen.append(f"{len(body)} bytes")
            other = sum(a != b for a, b in zip(body, CONTENT, strict=False))
            seen.extend([f"{other} other"] if other else [])
    except Exception as error:
        seen.append(type(error).__name__)
    finally:
        connection.close()
    return ", ".join(seen)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_what_its_name_says_and_is_gone_with_the_next_request(
    bucket: Bucket,
    fault: str,
) -> None:
    bucket.replace("object", CONTENT)
    path = bucket.url.removeprefix("s3:/") + "/object"
    with bucket.store.broken(Rule(fault, path="/object$")):
        patience = 0.3 if fault in SILENT else 60.0
        assert re.fullmatch(SEEN[fault], read(bucket.store, path, patience))
        while not bucket.store.served:  # by a busy machine, which takes up the request late
            time.sleep(0.01)
        assert read(bucket.store, path, 60.0) == SEEN["none"]
    assert [served.fault for served in bucket.store.served] == [fault, None]


def test_an_object_is_listed_with_its_bytes_and_is_created_only_once(
    bucket: Bucket,
) -> None:
    s3fs = pytest.importorskip("s3fs")
    files = s3fs.S3FileSystem()
    files.pipe_file(f"{bucket.url}/folder/a", b"first", mode="create")
    with pytest.raises(FileExistsError):
        files.pipe_file(f"{bucket.url}/folder/a", b"second", mode="create")
    assert bucket.contents() == {"folder/a": b"first"}
    assert [served.method for served in bucket.store.served] == ["PUT", "PUT"]
