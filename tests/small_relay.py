"""A relay before an object store, which breaks the requests that a rule names.

client --HTTP--> Relay (faults by rule, every request written down) --HTTP--> server
"""

import os
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message>'
    "<RequestId>0</RequestId></Error>"
)
_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "date", "server"}


@dataclass
class Rule:
    """Breaks requests whose method and path match.

    Attributes:
        fault: one of FAULTS.
        method, path: patterns; the path's is searched for in bucket, key and query.
        after: matching requests that it lets pass first.
        times: matching requests that it then breaks; None for all.
    """

    fault: str
    method: str = ".*"
    path: str = ""
    after: int = 0
    times: int | None = 1
    seen: int = 0

    def breaks(self, method: str, path: str) -> bool:
        """Count a request, and tell whether it is to be broken."""
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.seen > self.after and (
            self.times is None or self.seen <= self.after + self.times
        )


class Storm:
    """Breaks a share of all requests, each by a fault drawn from a seed.

    The same request it breaks twice in a row at most: in whatever order several threads ask, nobody
    needs more tries than are made however long each takes.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.fault = ""
        self._share = share
        self._random = random.Random(seed)
        self._in_a_row: Counter[tuple[str, str]] = Counter()

    def breaks(self, method: str, path: str) -> bool:
        """Draw whether a request is to be broken, and by what."""
        self.fault = self._random.choice(QUICK)
        broken = self._random.random() < self._share and self._in_a_row[method, path] < 2
        self._in_a_row[method, path] = self._in_a_row[method, path] + 1 if broken else 0
        return broken


@dataclass
class Served:
    """One request, the bytes of its body and of the answer's, and the fault that it met."""

    method: str
    path: str
    received: int = 0
    sent: int = 0
    fault: str | None = None


class SmallStore(ThreadingHTTPServer):
    """The relay.

    Attributes:
        rules: asked in order, the first that breaks a request is the one.
        served: every request since the list was last cleared.
    """

    daemon_threads = True

    def __init__(self, server_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.behind = server_port
        self.rules: list[Rule | Storm] = []
        self.served: list[Served] = []
        self._lock = Lock()

    @property
    def url(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def note(self, method: str, path: str) -> Served:
        """Write a request down, and which fault it meets."""
        served = Served(method, path)
        with self._lock:
            self.served.append(served)
            broken = [rule.fault for rule in self.rules if rule.breaks(method, path)]
        served.fault = broken[0] if broken else None
        return served

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the store's."""

    @contextmanager
    def broken(self, *rules: Rule | Storm) -> Iterator[None]:
        """These rules and no others until the block ends."""
        self.rules = list(rules)
        self.served.clear()
        try:
            yield
        finally:
            self.rules = []


class _Relay(BaseHTTPRequestHandler):
    server: SmallStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        """Hand a request on and its answer back, unless a fault has its way."""
        self.served = self.server.note(self.command, unquote(self.path))
        FAULTS[self.served.fault or "none"](self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def receive(self, share: float = 1.0) -> bytes:
        """The body of the request, or the first part of it."""
        body = self.rfile.read(int(int(self.headers.get("Content-Length", 0)) * share))
        self.served.received = len(body)
        return body

    def relay(self) -> tuple[HTTPResponse, bytes]:
        """What the server answers."""
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        with closing(HTTPConnection("127.0.0.1", self.server.behind, timeout=60)) as connection:
            connection.request(self.command, self.path, self.receive(), headers)
            response = connection.getresponse()
            return response, response.read()

    def begin(self, response: HTTPResponse, length: int) -> None:
        """Send the head of an answer."""
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        announced = response.getheader("Content-Length") if self.command == "HEAD" else str(length)
        self.send_header("Content-Length", announced or "0")
        self.end_headers()

    def send(self, body: bytes) -> None:
        """Send some of an answer's body."""
        self.served.sent += len(body)
        self.wfile.write(body)

    def reset(self) -> None:
        """Hang up without a farewell: the client sees a connection reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def refuse(self, status: int, code: str, message: str) -> None:
        """An error in S3's words."""
        self.receive()
        body = b"" if self.command == "HEAD" else _ERROR.format(code, message).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""


def _none(relay: _Relay) -> None:
    response, body = relay.relay()
    relay.begin(response, len(body))
    relay.send(body)


def _error(relay: _Relay) -> None:
    relay.refuse(500, "InternalError", "We encountered an internal error. Please try again.")


def _slow_down(relay: _Relay) -> None:
    relay.refuse(503, "SlowDown", "Please reduce your request rate.")


def _silence(relay: _Relay) -> None:
    relay.receive()
    relay.connection.settimeout(600)
    relay.connection.recv(1)  # until the client has had enough
    relay.close_connection = True


def _cut_upload(relay: _Relay) -> None:
    relay.receive(0.5)
    relay.reset()


def _lost_answer(relay: _Relay) -> None:
    relay.relay()
    relay.reset()


def _cut_header(relay: _Relay) -> None:
    relay.relay()
    relay.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    relay.reset()


def _cut_body(relay: _Relay) -> None:
    response, body = relay.relay()
    relay.begin(response, len(body))
    relay.send(body[: len(body) // 2])
    relay.reset()


def _end_body(relay: _Relay) -> None:
    response, body = relay.relay()
    relay.begin(response, len(body))
    relay.send(body[: len(body) // 2])
    relay.close_connection = True


def _short_body(relay: _Relay) -> None:
    response, body = relay.relay()
    half = body[: len(body) // 2] if relay.command == "GET" else body
    relay.begin(response, len(half))
    relay.send(half)


def _flip_bit(relay: _Relay) -> None:
    response, body = relay.relay()
    relay.begin(response, len(body))
    if relay.command == "GET" and body and "list-type" not in relay.path:
        middle = len(body) // 2
        body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
    relay.send(body)


def _dribble(relay: _Relay) -> None:
    _send_slowly(relay, piece=64, pause=0.005)


def _crawl(relay: _Relay) -> None:
    _send_slowly(relay, piece=1, pause=0.5)


def _send_slowly(relay: _Relay, piece: int, pause: float) -> None:
    response, body = relay.relay()
    relay.begin(response, len(body))
    for start in range(0, len(body), piece):
        relay.send(body[start : start + piece])
        time.sleep(pause)


FAULTS: dict[str, Callable[[_Relay], None]] = {
    "none": _none,
    "error": _error,
    "slow-down": _slow_down,
    "silence": _silence,
    "cut-upload": _cut_upload,
    "lost-answer": _lost_answer,
    "cut-header": _cut_header,
    "cut-body": _cut_body,
    "end-body": _end_body,
    "short-body": _short_body,
    "flip-bit": _flip_bit,
    "dribble": _dribble,
    "crawl": _crawl,
}

# Noticed at once: not waited for, and not only by checksums.
QUICK = ["error", "slow-down", "cut-upload", "lost-answer", "cut-header", "cut-body", "end-body"]
