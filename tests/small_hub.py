"""A hub of one process: it creates repositories, takes commits of small files, lists and gives.

`hub` is a fixture: one that answers, and the environment that it is found by.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest


class SmallHub(ThreadingHTTPServer):
    """What was sent to it: `created` requests, and `files` by repository and path; `sent`, how many
    bytes of files it has given away. As many commits as `rivals` find that another came before.

    A repository is there as soon as it has an entry in `files`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.sent = 0
        self.rivals = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def run_hub() -> Iterator[SmallHub]:
    """A hub that answers until the block ends."""
    hub = SmallHub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A hub on this machine, and the token that it takes."""
    with run_hub() as running:
        files = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setenv("HF_ENDPOINT", running.url)  # of other processes
        monkeypatch.setenv("HF_TOKEN", "hf_small")
        yield running


class _Answers(BaseHTTPRequestHandler):
    server: SmallHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_small":
            self._answer(401, {"error": "Invalid username or password."})
            return
        name = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            owner = asked.get("organization") or "me"
            self._answer(200, {"url": f"{self.server.url}/{owner}/{asked['name']}"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(200, {"files": [{"path": path, **kept} for path in paths]})
        elif "/commit/" in self.path and self.server.rivals:
            self.server.rivals -= 1
            self._answer(
                412, {"error": "A commit has happened since. Please refresh and try again."}
            )
        elif "/commit/" in self.path:
            files = self.server.files.setdefault(name, {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile" and not files.pop(line["value"]["path"], None):
                    self._miss("EntryNotFound")
                    return
            url = f"{self.server.url}/{name}/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:
            self._answer(200, {})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/"):
            _, _, _, owner, repository, *rest = path.split("/")
            name = f"{owner}/{repository}"
            if name not in self.server.files:
                self._miss("RepoNotFound")
            elif rest[:1] == ["tree"]:
                self._list(name, "/".join(rest[2:]), "recursive=true" in self.path.lower())
            else:
                self._answer(200, {"id": name, "sha": "0" * 40, "siblings": [], "private": False})
        else:
            _, _, owner, repository, _, _, *rest = path.split("/")
            content = self.server.files[f"{owner}/{repository}"].get("/".join(rest))
            if content is None:
                self._miss("EntryNotFound")
            else:
                self._give(content)

    def _list(self, name: str, folder: str, recursive: bool) -> None:
        files, found = self.server.files[name], {}
        for path, content in files.items():
            above = [str(parent) for parent in PurePosixPath(path).parents][:-1]
            for entry in (path, *above):
                inside = entry.startswith(f"{folder}/") if folder else True
                if inside and (recursive or "/" not in entry[len(folder) :].strip("/")):
                    kind = "file" if entry == path else "directory"
                    size = len(content) if entry == path else 0
                    found[entry] = {"type": kind, "path": entry, "oid": "0" * 40, "size": size}
        if folder and not found:
            self._miss("EntryNotFound")
        else:
            self._send(200, json.dumps([found[entry] for entry in sorted(found)]).encode())

    def _give(self, content: bytes) -> None:
        asked, status = self.headers.get("Range"), 200
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if int(first) >= len(content):
                self._answer(416, {"error": "range not satisfiable"})
                return
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        self.server.sent += len(content)
        self._send(status, content)

    def _miss(self, code: str) -> None:
        self._answer(404, {"error": "not found"}, {"X-Error-Code": code})

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def _answer(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
