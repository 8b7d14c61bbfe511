"""An object store on loopback: an S3-compatible server of its own process, and a relay that breaks.

    s3fs --HTTP--> Relay (faults by rule, every request written down) --HTTP--> server (moto)

`store` is a fixture of the whole session, `bucket` an empty place in it for one test, with the
environment that any S3-compatible store is found by. STILLROOM_STORES names further stores, by
addresses under which anything may be written, that what holds of every store is tried on too.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import count
from threading import Thread
from uuid import uuid4

import pytest
from small_relay import SmallStore

from stages.loopback import serve_store

SIGNED = "AWS4-HMAC-SHA256 Credential=small/20260101/us-east-1/s3/aws4_request"
BUCKET = "caches"
STORES = ["memory", "s3", "hf", *os.environ.get("STILLROOM_STORES", "").split()]


@dataclass
class Bucket:
    """An empty place in the store, for one test.

    Attributes:
        store: what answers.
        url: s3://<bucket>/<name>.
    """

    store: SmallStore
    url: str

    def contents(self) -> dict[str, bytes]:
        """The objects below `url`, by their names; asked of the server itself."""
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        listing = self._ask("GET", f"/{bucket}?list-type=2&prefix={prefix}/").decode()
        keys = re.findall(r"<Key>(.*?)</Key>", listing)
        assert "<IsTruncated>true" not in listing
        return {
            key.removeprefix(f"{prefix}/"): self._ask("GET", f"/{bucket}/{key}") for key in keys
        }

    def replace(self, name: str, content: bytes) -> None:
        """Put an object behind everybody's back."""
        self._ask("PUT", f"/{self.url.removeprefix('s3://')}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove an object behind everybody's back."""
        self._ask("DELETE", f"/{self.url.removeprefix('s3://')}/{name}")

    def below(self, name: str) -> "Bucket":
        """A place inside of this one."""
        return Bucket(self.store, f"{self.url}/{name}")

    def uploads(self) -> int:
        """Multipart uploads that were begun and neither finished nor given up."""
        bucket = self.url.removeprefix("s3://").split("/")[0]
        return self._ask("GET", f"/{bucket}?uploads").count(b"<UploadId>")

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        return ask_server(self.store.behind, method, path, body)


def ask_server(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """Ask the server itself, past the relay."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Authorization": SIGNED})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    assert response.status in (200, 204), (method, path, response.status, content)
    return content


@contextmanager
def run_store() -> Iterator[SmallStore]:
    """A store that answers until the block ends; its server goes with this process."""
    with serve_store() as port:
        ask_server(port, "PUT", f"/{BUCKET}")
        store = SmallStore(port)
        thread = Thread(target=store.serve_forever, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
            store.server_close()


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "small",
    "AWS_SECRET_ACCESS_KEY": "store",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # so that every request is one of Stillroom's own
    "STILLROOM_STORE_PATIENCE": "0.1",
    "STILLROOM_STORE_TIMEOUT": "60",
}
_NAMES = count()


@pytest.fixture(scope="session")
def store() -> Iterator[SmallStore]:
    """The store of this session."""
    pytest.importorskip("s3fs", reason="extra s3 is not installed")
    pytest.importorskip("moto.moto_server", reason="moto[s3] and flask are not installed")
    with run_store() as running:
        yield running


@pytest.fixture
def bucket(store: SmallStore, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty place in the store, and the environment that it is found by."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": store.url}.items():
        monkeypatch.setenv(name, value)
    store.rules = []
    store.served.clear()
    return Bucket(store, f"s3://{BUCKET}/{next(_NAMES)}")


def find_place(kind: str, request: pytest.FixtureRequest) -> str:
    """An empty address in one of STORES."""
    if kind == "memory":
        return f"memory://{uuid4().hex}/0"
    if kind == "s3":
        return str(request.getfixturevalue("bucket").url)
    if kind == "hf":
        request.getfixturevalue("hub").files["me/caches"] = {}
        return "hf://datasets/me/caches/0"
    return f"{kind.rstrip('/')}/{uuid4().hex}"
