"""What a student was made from, as its card tells it: by names and licences, without paths.

cache, its config, the student's config -> {"data", "inputs", "teacher", "student", "targets"}

Nothing is asked of the network: a licence is what a config says, or what the card (README.md) of a
folder or of a download says; None is unknown.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.hub import try_to_load_from_cache

from pipeline.batches import Selection
from pipeline.cache import TeacherCache
from pipeline.errors import StillroomError
from pipeline.reading import Reading
from pipeline.sources import DataConfig
from pipeline.sources.sib200 import HUB_NAME
from pipeline.student import FromScratch, StudentOrigin
from stages.naming import name_teacher, read_cache_config

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # their names say nothing of the data
_UNKNOWN = ("", "unknown", "none")


def describe_provenance(
    reading: Reading,
    train: Selection,
    split: str,
    origin: StudentOrigin,
    inputs: DataConfig | None,
    further: Sequence[Path],
) -> dict[str, Any]:
    """What is known of where a student comes from; JSON values only.

    Args:
        reading: the cache as the student reads it.
        train: what it learns from.
        split: what it is measured on.
        origin: where its weights come from.
        inputs: texts of its own.
        further: the caches of further teachers.
    """
    asked = read_cache_config(reading.cache)
    kept = reading.cache.manifest.targets
    read = asked.get("data", {})
    data = _describe_data(read)
    own = None if inputs is None else _describe_data(inputs.model_dump(mode="json"))
    if inputs is not None and own is not None and inputs.source not in _BUILDERS:
        same = inputs.source == read.get("source")
        own["licence"] = own["licence"] or (data["licence"] if same else None)
    return {
        "data": data,
        "inputs": own,
        "examples": {"train": len(train), split: len(reading.select(split))},
        "languages": _languages(reading, train),
        "teacher": _describe_teacher(reading.cache),
        "further_teachers": [_describe_teacher(TeacherCache.open(path)) for path in further],
        "student": None if isinstance(origin, FromScratch) else _describe_model(origin.model, None),
        "targets": {
            "top_k": kept.top_k,
            "tail_draws": kept.tail_draws,
            "temperatures": list(kept.temperatures),
        },
    }


def _describe_teacher(cache: TeacherCache) -> dict[str, Any]:
    asked = read_cache_config(cache).get("teacher", {})
    name = name_teacher(cache) or str(cache.manifest.identity.teacher["architecture"])
    return {"name": name, **_describe_model(asked.get("model"), asked.get("licence"))}


def _describe_model(name: str | None, licence: str | None) -> dict[str, Any]:
    hub = _hub_name(name)
    return {"hub": hub, "licence": licence or _read_licence(name, hub, "model")}


def _describe_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `data` or `inputs` section: what it is called, its place on the hub, its licence."""
    source = data.get("source")
    licence = data.get("licence")
    if source is None or source in _BUILDERS:
        name = None if source is None else f"{source} files"
        return {"name": name, "hub": None, "licence": licence}
    hub = HUB_NAME if source == "sib200" else _hub_name(source)
    if hub is not None and "/" not in hub:
        hub = None  # one of our own sources
    return {
        "name": hub or Path(source).expanduser().resolve().name,
        "hub": hub,
        "licence": licence or _read_licence(source, hub, "dataset"),
    }


def _hub_name(name: str | None) -> str | None:
    """The name, where it is one of the hub and not a folder or a file of this machine."""
    if name is None or Path(name).expanduser().exists() or not _HUB_NAME.fullmatch(name):
        return None
    return name


def _read_licence(name: str | None, hub: str | None, kind: str) -> str | None:
    """What the card in a folder, or in the cache of downloads, says."""
    if name is None:
        return None
    found: Any = Path(name).expanduser() / "README.md"
    if hub is not None:
        found = try_to_load_from_cache(hub, "README.md", repo_type=kind)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    parts = Path(found).read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    licence = header.get("license") if isinstance(header, dict) else None
    known = isinstance(licence, str) and licence.lower() not in _UNKNOWN
    return licence if known else None


def _languages(reading: Reading, train: Selection) -> list[str]:
    """The values of the column `language` among the examples to learn from, where it is carried."""
    try:
        return sorted(reading.group(train, "language"))
    except StillroomError:
        return []
