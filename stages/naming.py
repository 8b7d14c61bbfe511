"""What people call the teacher of a cache; its manifest knows it by content alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.cache import TeacherCache, list_parts
from pipeline.errors import CacheError

_MOST_BYTES = 2**20
_TOLD = {"teacher": ("model", "licence"), "data": ("source", "licence")}


def name_teacher(cache: TeacherCache) -> str | None:
    """The last part of its folder or hub name; None where the cache does not tell it."""
    model = read_cache_config(cache).get("teacher", {}).get("model")
    return None if model is None else Path(model).expanduser().resolve().name


def read_cache_config(cache: TeacherCache) -> dict[str, dict[str, str]]:
    """What the config that a cache, or a view's first, was made by calls its teacher and data.

    It came with the cache, so that anybody may have written it: no more is read of it than these
    texts, and one that makes no sense tells nothing.
    """
    file = list_parts(cache)[0].cache.path / "config.yaml"
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {section: _pick(config, section, names) for section, names in _TOLD.items()}


def require_asked(cache: TeacherCache) -> None:
    """Refuse a cache whose teacher was asked by somebody else.

    Raises:
        CacheError: its targets are those of a dump.
    """
    imported = cache.manifest.imported
    if imported is not None:
        raise CacheError(
            f"{cache.path}: its targets were imported ({imported.describe()}), so its teacher"
            " cannot be asked again as it was; cache the teacher yourself with `stillroom"
            " cache-teacher`"
        )


def _pick(config: Any, section: str, names: Sequence[str]) -> dict[str, str]:
    found = config.get(section) if isinstance(config, dict) else None
    if not isinstance(found, dict):
        return {}
    texts = {name: found[name] for name in names if isinstance(found.get(name), str)}
    return {name: text for name, text in texts.items() if text.isprintable()}
