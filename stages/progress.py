"""What a stage shows while it runs: a bar for a capture, one line for each log of a training."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from pipeline.cache import CacheWriter
from pipeline.teacher import Spool

_LINE_SECONDS = 30.0  # between lines where there is no terminal


def tell_line(line: str) -> None:
    """Say what the user should know, as it is."""
    Console().print(line, soft_wrap=True, markup=False, highlight=False)


class RowProgress:
    """Rows that are done, percent and time left."""

    def __init__(self, console: Console, verb: str, rows: int | None = None) -> None:
        self._bar = Progress(
            TextColumn(verb),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=rows)

    def __enter__(self) -> "RowProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, done: int, total: int | None = None) -> None:
        """Show how many rows are done, and of how many where that was not known before."""
        self._bar.update(self._task, completed=done, total=total)


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
        if not (self._done and written):  # the longest texts are asked first, and wait for others
            return f"{rate:,.0f} tokens/s"
        size, each = written / 1e6, written / self._done
        return f"{rate:,.0f} tokens/s, {size:,.1f} MB, {each:.0f} B/token"


class TrainingProgress(TrainerCallback):  # type: ignore[misc]  # ships without types
    """One line for each log: step, losses, time per step without evaluation, time left.

    demo-kd  step 50/400  loss 5.61  held-out loss 5.10  212 ms/step  ETA 1:14
    """

    def __init__(self, name: str, console: Console | None = None) -> None:
        self._name = name
        self._console = console or Console()
        self._step = 0
        self._since = time.monotonic()
        self._train = ""
        self._rate = 0.0  # seconds per step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step, self._since = state.global_step, time.monotonic()
        if state.global_step and state.is_world_process_zero:
            self._console.print(f"{self._name}  continues after step {state.global_step:,}")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Hold the line back where the held-out loss of this step is still to come."""
        if "loss" in logs:
            steps = max(state.global_step - self._step, 1)
            self._rate = (time.monotonic() - self._since) / steps
            self._train = f"  loss {logs['loss']:.3g}"
            self._step, self._since = state.global_step, time.monotonic()
            if not control.should_evaluate:
                self._print(state, "")
        elif held_out := {k: v for k, v in logs.items() if k.startswith("eval_")}:
            shown = "eval_loss" if "eval_loss" in held_out else next(iter(held_out))
            self._print(state, f"  held-out {shown[5:]} {held_out[shown]:.3g}")
            self._since = time.monotonic()

    def _print(self, state: Any, held_out: str) -> None:
        if state.is_world_process_zero:
            left = round((state.max_steps - state.global_step) * self._rate)
            self._console.print(
                f"{self._name}  step {state.global_step:,}/{state.max_steps:,}{self._train}"
                f"{held_out}  {1000 * self._rate:.0f} ms/step  ETA {left // 60}:{left % 60:02d}",
                soft_wrap=True,
                highlight=False,
            )
        self._train = ""
