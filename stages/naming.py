"""What people call the teacher of a cache; its manifest knows it by content alone."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.cache import TeacherCache


def name_teacher(cache: TeacherCache) -> str | None:
    """The last part of its folder or hub name; None where the cache does not tell it."""
    config = read_cache_config(cache)
    return Path(config["teacher"]["model"]).expanduser().resolve().name if config else None


def read_cache_config(cache: TeacherCache) -> dict[str, Any]:
    """The config that a cache was made by; empty where it is not told."""
    file = cache.path / "config.yaml"
    if not file.is_file():
        return {}
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config
