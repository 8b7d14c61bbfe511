"""What a capture shows while it runs: a bar on a terminal, a few lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.cache import CacheWriter
from pipeline.teacher import Spool

_LINE_SECONDS = 30.0  # between lines where there is no terminal


class CaptureProgress:
    """Tokens/s, percent, time left, bytes written and bytes per token."""

    def __init__(self, console: Console, spool: Spool, writer: CacheWriter) -> None:
        size = writer.draft.shard_examples
        self._console = console
        self._writer = writer
        self._total = sum(spool.lengths)
        self._done = self._before = sum(
            sum(spool.lengths[index * size : (index + 1) * size]) for index in writer.finished
        )
        self._began = self._told = time.monotonic()
        self._bar = Progress(
            TextColumn("caching"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._done, facts="")

    def __enter__(self) -> "CaptureProgress":
        if self._before:
            share = 100.0 * self._before / max(self._total, 1)
            self._console.print(
                f"{self._writer.path}: continues after {len(self._writer.finished)} of"
                f" {self._writer.draft.num_shards} shards, {share:.0f} %"
            )
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, tokens: int, written: int) -> None:
        """Count the tokens of a batch that was asked; `written` bytes are safe on the disk."""
        self._done += tokens
        facts = self._facts(written)
        self._bar.update(self._task, completed=self._done, facts=facts)
        if not self._console.is_terminal and time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            share = 100.0 * self._done / self._total
            self._console.print(f"caching {share:3.0f} %, {facts}")

    def _facts(self, written: int) -> str:
        tokens = self._done - self._before
        rate = tokens / max(time.monotonic() - self._began, 1e-9)
        per_token = f", {written / self._done:.0f} B/token" if self._done and written else ""
        return f"{rate:,.0f} tokens/s, {written / 1e6:,.1f} MB{per_token}"
