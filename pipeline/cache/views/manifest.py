"""The manifest of a view: that of a cache which would hold the same.

manifest of each part, with its overlays -> Seen.manifest -- alike? --> one, counts summed
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.documents import require_same
from pipeline.cache.manifest import Draft, Identity, Manifest, Totals

# What a draft says beside its size and its data, in which the parts of a view may differ.
_QUESTION = {"task", "num_classes", "shifted", "label_names"}
_KIND = _QUESTION | {"targets", "signals", "positions", "columns", "projections"}


@dataclass(frozen=True)
class Seen:
    """What the manifests of a part of a view say.

    Attributes:
        path: of its cache.
        own: the cache's; over: those of overlays, and whether their targets are taken.
        share: of the cache's rows that are taken; rows: how many these are.
    """

    path: Path
    own: Manifest
    over: Sequence[tuple[Manifest, bool]]
    share: float
    rows: int

    @property
    def manifest(self) -> Manifest:
        """As if it were one cache.

        Raises:
            MismatchError: an overlay of another teacher, tokenizer or task.
        """
        found = self.own
        for more, targets in self.over:
            remedy = "Only what the same teacher says of the same tokens can be laid over a cache"
            fields = _QUESTION | (
                {"positions"} if _per_feature(found) and _per_feature(more) else set()
            )
            _require_same(self.path, found, more, fields, remedy)
            changes: dict[str, Any] = {
                "signals": found.signals | more.signals,
                "fidelity": found.fidelity | more.fidelity,
                "head": more.head or found.head,
                "projections": _join(found.projections, more.projections),
                "skipped": found.skipped | more.skipped,
            }
            if _per_feature(more):
                changes["positions"] = more.positions
            if targets:
                changes["targets"] = more.targets
            found = found.model_copy(update=changes)
        return found

    def count(self, name: str) -> int:
        """A total of the rows taken, an estimate where others are left out; bytes of overlays too.

        Those of overlays are shared out like the part's own.
        """
        own: float = getattr(self.own.totals, name) * self.share
        if name == "bytes":
            own += sum(m.totals.bytes * self.rows / m.num_examples for m, _ in self.over)
        elif name == "features" and not own:
            own = sum(m.totals.features * self.rows / m.num_examples for m, _ in self.over[:1])
        return round(own)


def describe_view(path: Path, parts: Sequence[Seen], digest: str) -> Manifest:
    """The manifest of a view.

    Args:
        digest: of what is seen.

    Raises:
        MismatchError: parts of another teacher, tokenizer, task or other settings; names them.
    """
    manifests = [part.manifest for part in parts]
    first = manifests[0]
    for part, manifest in zip(parts[1:], manifests[1:], strict=True):
        require_alike(parts[0].path, first, part.path, manifest)
    totals = {name: sum(part.count(name) for part in parts) for name in Totals.model_fields}
    totals["examples"] = sum(part.rows for part in parts)
    changes = {
        "identity": _join_identities([manifest.identity for manifest in manifests]),
        "num_examples": totals["examples"],
        "totals": Totals(**totals),
        "shards": digest,
        "files": {},
        "skipped": {},  # what is skipped of the rows taken the view finds out itself
    }
    return first.model_copy(update=changes)


def require_alike(path: Path, first: Manifest, other_path: Path, other: Manifest) -> None:
    """Refuse caches that no single capture could have made of more data.

    Raises:
        MismatchError: names the fields that differ.
    """
    remedy = f"Only caches of one teacher, tokenizer, task and settings join {path}"
    _require_same(other_path, other, first, _KIND, remedy)


def require_fits(path: Path, manifest: Manifest, draft: Draft) -> None:
    """Refuse a capture that is to add to a cache, before it has asked anything.

    Raises:
        MismatchError: names the fields that differ.
    """
    fields = _KIND - {"projections"}
    remedy = "Only what one teacher, tokenizer, task and settings make can extend a cache"
    _require_same(path, manifest, draft, fields, remedy)


def require_overlaid(path: Path, manifest: Manifest, more: Draft) -> None:
    """Refuse what does not speak of the same as a cache over which it is to be laid.

    Raises:
        MismatchError: names the fields that differ.
    """
    both = _per_feature(manifest) and _per_feature(more)
    fields = _QUESTION | ({"positions"} if both else set())
    remedy = "Only what the same teacher says of the same tokens can be laid over a cache"
    _require_same(path, manifest, more, fields, remedy)


def _require_same(path: Path, one: Draft, other: Draft, fields: set[str], why: str) -> None:
    """Compare these fields, the tokenizer and the teacher, as far as both manifests tell them."""
    found, asked = (m.model_dump(mode="json", include=fields) for m in (one, other))
    for dump in (found, asked):
        dump.get("targets", {}).pop("compression", None)  # how bytes are packed, not what they say
    for part in ("tokenizer", "teacher"):
        mine, theirs = getattr(one.identity, part), getattr(other.identity, part)
        shared = mine.keys() & theirs.keys()  # a cache from before tells less of its teacher
        found[part] = {name: mine[name] for name in shared}
        asked[part] = {name: theirs[name] for name in shared}
    require_same(path, found, asked, why)


def _per_feature(manifest: Draft) -> bool:
    return any(signal.per == "feature" for signal in manifest.signals.values())


def _join_identities(identities: Sequence[Identity]) -> Identity:
    first = identities[0]
    joined = {
        name: _join_parts([getattr(identity, name) for identity in identities])
        for name in ("data", "preprocessing")
    }
    return first.model_copy(update=joined)


def _join_parts(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a view of several data sets was made from; of one, that."""
    digests = dict.fromkeys(str(part["digest"]) for part in found)
    if len(digests) == 1:
        return dict(found[0])
    return {"digest": _digest("\n".join(digests)), "parts": list(digests)}


def _join(one: str | None, other: str | None) -> str | None:
    return _digest(f"{one}\n{other}") if one and other else one or other


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
