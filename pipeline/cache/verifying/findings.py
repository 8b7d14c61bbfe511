"""What was found when a cache was verified."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["hole", "damage", "count", "duplicate", "index", "orphan"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: hole (missing), damage (bytes, or what they mean), count (a sum that is wrong),
            duplicate (an id that stands twice), index (it does not fit the shards), orphan (a file
            that belongs to nothing, which harms nobody).
        file: its path in the cache.
        what: what is wrong with it, in a few words.
        shard: whose file it is.
    """

    kind: Kind
    file: str
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Report:
    """The state of a cache.

    Attributes:
        path: its folder.
        finished: whether it has a manifest.
        shards: how many it has, or is to have.
        pending: those that are not written yet; of an unfinished cache only.
        checked: examples that were looked at.
        bytes: of the shards that were looked at.
        findings: sorted by file.
    """

    path: str
    finished: bool
    shards: int
    pending: Sequence[int] = ()
    checked: int = 0
    bytes: int = 0
    findings: Sequence[Finding] = field(default=())

    @property
    def harm(self) -> list[Finding]:
        """All findings but orphans."""
        return [finding for finding in self.findings if finding.kind != "orphan"]

    @property
    def orphans(self) -> list[Finding]:
        """Files that belong to nothing."""
        return [finding for finding in self.findings if finding.kind == "orphan"]

    @property
    def damaged_shards(self) -> list[int]:
        """Numbers of the shards that have to be written again."""
        return sorted({finding.shard for finding in self.harm if finding.shard is not None})

    @property
    def state(self) -> Literal["whole", "unfinished", "damaged"]:
        """In one word; an unfinished cache is damaged where what stands of it is."""
        if self.harm:
            return "damaged"
        return "whole" if self.finished else "unfinished"

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        own = {name: value for name, value in asdict(self).items() if name != "findings"}
        facts = {"state": self.state, "damaged_shards": self.damaged_shards}
        return {**own, **facts, "findings": [asdict(finding) for finding in self.findings]}
