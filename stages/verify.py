"""Is a cache what it was written as, and mend what is not.

cache -> verify_cache -> what was found, and with --repair what was done -> exit code
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from pipeline.cache import TeacherCache
from pipeline.cache.verifying.beside import CAPTURE, SETTINGS
from pipeline.cache.verifying.findings import Finding, Report
from pipeline.cache.verifying.repairing import repair_cache
from pipeline.cache.verifying.whole import Depth, verify_cache
from pipeline.cache.views.file import is_view, list_folders
from pipeline.errors import CacheError, ConfigError
from pipeline.locking.locks import occupy
from pipeline.report.rows import format_bytes
from stages.progress import RowProgress

if TYPE_CHECKING:
    from stages.recomputing import Difference

# Exit codes; 1 is any other error, 2 a wrong option.
WHOLE, UNFINISHED, DAMAGED, OTHERWISE = 0, 3, 4, 5
_CODES = {"whole": WHOLE, "unfinished": UNFINISHED, "damaged": DAMAGED}
_SHOWN = 20  # findings; --json has them all
_ASKED = 32  # examples that a teacher is asked about again


def verify(
    path: Path,
    depth: Depth,
    repair: bool = False,
    teacher: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Check a cache, or all that a view sees, print what was found, and return the exit code; of
    several the worst.

    Args:
        repair: mend it too; the code is then that of what it has become.
        teacher: a model that is asked again about the sample, or about 32 examples.

    Raises:
        ConfigError: a view that is to be repaired.
        CacheError: no cache, one of a newer format, or, to be repaired, one that somebody works on.
    """
    console = console or Console()
    if is_view(path):
        if repair:  # whoever made the view may have named any folder
            caches = ", ".join(map(str, list_folders(path)))
            raise ConfigError(
                f"{path}: is a view; --repair changes no cache that it names, give it the cache's"
                f" own path: {caches}"
            )
        return _verify_view(path, partial(_examine, depth, repair, teacher), as_json, console)
    found = _examine(depth, repair, teacher, path)
    if as_json:
        console.print_json(json.dumps(found.dump()))
    else:
        found.print(console)
    return found.code


def _verify_view(
    path: Path, examine: "Callable[[Path], _Examined]", as_json: bool, console: Console
) -> int:
    found: list[_Examined] = []
    damage: str | None = None
    try:
        found += map(examine, list_folders(path))
        if all(one.state == "whole" for one in found):
            TeacherCache.open(path)
    except CacheError as error:
        damage = str(error)
    code = DAMAGED if damage is not None else max(one.code for one in found)
    if as_json:
        caches = [one.dump() for one in found]
        told = {"path": str(path), "damage": damage, "caches": caches, "exit_code": code}
        console.print_json(json.dumps(told))
    else:
        for one in found:
            one.print(console)
        if damage is not None:
            console.print(Text(f"damaged   {damage}"), soft_wrap=True)
    return code


@dataclass(frozen=True)
class _Examined:
    """What was found of one cache, what was done about it, and what it is now."""

    report: Report
    done: list[str]
    state: str
    difference: "Difference | None"

    @property
    def code(self) -> int:
        """The exit code."""
        otherwise = self.difference is not None and self.difference.outside
        return OTHERWISE if otherwise else _CODES[self.state]

    def dump(self) -> dict[str, Any]:
        """JSON values."""
        content = {**self.report.dump(), "done": self.done, "state_now": self.state}
        content["exit_code"] = self.code
        if self.difference is not None:
            content["teacher"] = self.difference.dump()
        return content

    def print(self, console: Console) -> None:
        """A line for each finding and one for the whole."""
        _print_report(self.report, self.done, self.state, console)
        if self.difference is not None:
            _print_difference(self.difference, console)


def _examine(depth: Depth, repair: bool, teacher: str | None, path: Path) -> _Examined:
    with ExitStack() as stack:
        if repair:
            stack.enter_context(occupy(path, "verify --repair"))
        with RowProgress(Console(stderr=True), "verifying") as bar:
            report = verify_cache(path, depth, bar.advance)
        done = repair_cache(path, report) if repair else []
    state = _state_after(report) if repair else report.state
    difference = None
    if teacher is not None and state == "whole":
        from stages.recomputing import ask_again  # which loads a model

        difference = ask_again(path, teacher, depth.sample or _ASKED, depth.seed)
    return _Examined(report, done, state, difference)


def _state_after(report: Report) -> str:
    """What a report's cache is once it is repaired."""
    if not report.harm:
        return report.state
    if any(finding.kind == "duplicate" for finding in report.harm):
        return "damaged"
    beside = [finding for finding in report.harm if finding.shard is None]
    mended = not report.damaged_shards and all(map(_is_mended, beside))
    return "whole" if report.finished and mended else "unfinished"


def _is_mended(finding: Finding) -> bool:
    """Whether the repair itself wrote it anew."""
    return finding.file in (CAPTURE, SETTINGS) or finding.file.startswith("index/")


def _print_report(report: Report, done: list[str], state: str, console: Console) -> None:
    for finding in [*report.harm, *report.orphans][:_SHOWN]:
        console.print(Text(f"{finding.kind:<9} {finding}"), soft_wrap=True)
    hidden = len(report.findings) - _SHOWN
    if hidden > 0:
        console.print(f"and {hidden:,} findings more; --json lists them all")
    for line in done:
        console.print(Text(f"repaired  {line}"), soft_wrap=True)
    console.print(Text(f"{report.path}: {_summarise(report, state)}"), soft_wrap=True)


def _print_difference(found: "Difference", console: Console) -> None:
    signals = "".join(f", cosine of {name} {value:.5f}" for name, value in found.cosine.items())
    console.print(
        Text(
            f"teacher   {found.examples:,} examples, {found.targets:,} targets asked again:"
            f" |Δ log p| {found.mean_log_prob:.2g} in the mean, {found.max_log_prob:.2g} at most;"
            f" KL {found.mean_kl:.2g} in the mean, {found.max_kl:.2g} at most{signals}"
        ),
        soft_wrap=True,
    )
    for line in found.outside:
        console.print(Text(f"teacher   says something else: {line}"), soft_wrap=True)


def _summarise(report: Report, state: str) -> str:
    looked = f"{report.checked:,} examples looked at"
    if report.bytes:
        looked += f", {format_bytes(report.bytes)} of shards"
    standing = report.shards - len(report.pending)
    if state == "unfinished":
        standing -= len(report.damaged_shards)
        return (
            f"not finished, {standing:,} of {report.shards:,} shards stand and are sound; run its"
            " `stillroom cache-teacher` command again to continue"
        )
    if state == "whole":
        return f"whole; {looked}"
    named = ", ".join(map(str, report.damaged_shards[:8]))
    shards = f" in {_count(len(report.damaged_shards), 'shard')} ({named})" if named else ""
    remedy = "mend it with --repair, or copy it again"
    return f"damaged, {_count(len(report.harm), 'finding')}{shards}; {looked}; {remedy}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
