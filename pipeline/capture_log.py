"""What a capture took, session by session, in a file beside the cache."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.cache.checksums import sum_files
from pipeline.cache.documents import read_json, write_sealed
from pipeline.cache.manifest import Files, Totals
from pipeline.errors import CacheError


@dataclass
class CaptureLog:
    """What a capture took, over all its sessions; kept in capture.json, out of the manifest.

    Attributes:
        path: capture.json.
        teacher_files: see `describe_files`; tells whether the teacher was touched since.
        sessions: one dict per session: seconds (all, from the first batch to the last byte),
            forward_seconds (the model alone, its head included, the mean over the workers), tokens,
            targets, examples, bytes (of the cache so far), device, dtype, workers, threads (of
            all workers together), libraries (see `list_libraries`), session (a name of its own).
            Processes that shared the work ran side by side, so that the sum of their seconds is
            more than a clock showed.
        turn: held while the file is read and written, where several processes write it.
    """

    path: Path
    teacher_files: dict[str, Any]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    _beside: Files = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        path: Path,
        teacher_files: dict[str, Any] | None = None,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> "CaptureLog":
        """Read what stands, nothing where there is no file.

        Args:
            path: capture.json.
            teacher_files: those of a new session, in place of the recorded ones.
            turn: see the class.

        Raises:
            CacheError: it is damaged.
        """
        raw = read_json(path) if path.is_file() else {}
        recorded = raw.get("teacher_files", {})
        files = recorded if teacher_files is None else teacher_files
        sessions = raw.get("sessions", [])
        known = isinstance(sessions, list) and all(isinstance(one, dict) for one in sessions)
        if not known or not isinstance(files, dict):
            raise CacheError(f"{path}: its sessions are no objects; remove it, nothing hangs on it")
        return cls(path, files, sessions, turn)

    def begin(self, session: dict[str, Any]) -> None:
        """Add a session of this process; what is in it is recorded whenever the log is saved."""
        self.sessions.append(session)

    def total(self, name: str) -> float:
        """The sum of a number over the sessions."""
        return float(sum(session[name] for session in self.sessions))

    def save(self, last: bool = False) -> None:
        """Write the sessions and their sums, and the checksums of the config they ran with.

        Args:
            last: sum up the config once more, which another process may have written meanwhile.
        """
        if last or not self._beside:
            self._beside = sum_files(self.path.parent, "config.yaml", "teacher.json")
        own = self.sessions[-1]
        with self.turn():
            recorded = CaptureLog.read(self.path).sessions
            others = [one for one in recorded if one.get("session") != own["session"]]
            self.sessions = [*others, own]
            self._write(own)

    def _write(self, last: Mapping[str, Any]) -> None:
        times = {name: self.total(name) for name in ("seconds", "forward_seconds")}
        counts = {name: int(self.total(name)) for name in ("tokens", "targets", "examples")}
        kept = {name: last[name] for name in ("bytes", "device", "dtype", "workers", "threads")}
        content = {**times, **counts, **kept, "sessions": self.sessions}
        content["files"] = self._beside
        write_sealed(self.path, {**content, "teacher_files": self.teacher_files})

    def summarise(self, cache: Path, totals: Totals) -> str:
        """One line about a finished cache; what was asked twice counts twice in the time alone."""
        seconds = max(self.total("seconds"), 1e-9)
        share = 100.0 * self.total("forward_seconds") / seconds
        return (
            f"{cache}: {totals.examples:,} examples, {totals.tokens:,} tokens in"
            f" {seconds:,.1f} s ({self.total('tokens') / seconds:,.0f} tokens/s, {share:.0f} % of"
            f" it the teacher's forward pass), {totals.bytes / 1e6:,.1f} MB,"
            f" {totals.bytes / max(totals.tokens, 1):.0f} B/token"
        )


def list_libraries() -> dict[str, str]:
    """Versions of the packages whose code makes numbers and tokens."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers")}
