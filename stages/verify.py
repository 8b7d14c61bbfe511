"""Is a cache what it was written as, and mend what is not.

cache -> verify_cache -> what was found, and with --repair what was done -> exit code
"""

import json
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipeline.cache.findings import Finding, Report
from pipeline.cache.locks import occupy
from pipeline.cache.repairing import repair_cache
from pipeline.cache.verifying import Depth, verify_cache
from pipeline.cache.verifying_beside import CAPTURE
from pipeline.report.rows import format_bytes
from stages.progress import RowProgress

WHOLE, UNFINISHED, DAMAGED = 0, 3, 4  # exit codes; 1 is any other error, 2 a wrong option
_CODES = {"whole": WHOLE, "unfinished": UNFINISHED, "damaged": DAMAGED}
_SHOWN = 20  # findings; --json has them all


def verify(
    path: Path,
    depth: Depth,
    repair: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Check a cache, print what was found, and return the exit code.

    Args:
        repair: mend it too; the code is then that of what it has become.

    Raises:
        CacheError: no cache, one of a newer format, or, to be repaired, one that somebody works on.
    """
    console = console or Console()
    with ExitStack() as stack:
        if repair:
            stack.enter_context(occupy(path, "verify --repair"))
        with RowProgress(Console(stderr=True), "verifying") as bar:
            report = verify_cache(path, depth, bar.advance)
        done = repair_cache(path, report) if repair else []
    state = _state_after(report) if repair else report.state
    if as_json:
        content = {**report.dump(), "done": done, "state_now": state}
        console.print_json(json.dumps(content))
    else:
        _print_report(report, done, state, console)
    return _CODES[state]


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
    return finding.file == CAPTURE or finding.file.startswith("index/")


def _print_report(report: Report, done: list[str], state: str, console: Console) -> None:
    for finding in [*report.harm, *report.orphans][:_SHOWN]:
        console.print(Text(f"{finding.kind:<9} {finding}"), soft_wrap=True)
    hidden = len(report.findings) - _SHOWN
    if hidden > 0:
        console.print(f"and {hidden:,} findings more; --json lists them all")
    for line in done:
        console.print(Text(f"repaired  {line}"), soft_wrap=True)
    console.print(Text(f"{report.path}: {_summarise(report, state)}"), soft_wrap=True)


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
    shards = f" in {len(report.damaged_shards):,} shards ({named})" if named else ""
    remedy = "mend it with --repair, or copy it again"
    return f"damaged, {len(report.harm):,} findings{shards}; {looked}; {remedy}"
