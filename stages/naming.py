"""What people call the teacher of a cache; its manifest knows it by content alone."""

from pathlib import Path

import yaml

from pipeline.cache import TeacherCache


def name_teacher(cache: TeacherCache) -> str | None:
    """The last part of its folder or hub name; None where the cache does not tell it."""
    file = cache.path / "config.yaml"
    if not file.is_file():
        return None
    model = yaml.safe_load(file.read_text(encoding="utf-8"))["teacher"]["model"]
    return Path(model).expanduser().resolve().name
