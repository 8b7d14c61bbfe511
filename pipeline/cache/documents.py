"""The JSON files of a cache: read, validated, and compared field by field."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import Model, parse_config
from pipeline.errors import CacheError, ConfigError, MismatchError


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CacheError: missing, damaged, or no object.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{file}: cannot be read ({error}); cache the teacher again") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{file}: holds no object; cache the teacher again")
    return raw


def parse_document(model: type[Model], raw: dict[str, Any], file: Path) -> Model:
    """Validate what `read_json` read.

    Raises:
        CacheError: the first thing wrong.
    """
    try:
        return parse_config(model, raw, str(file))
    except (ConfigError, ValidationError) as error:
        raise CacheError(f"{error}; the file is damaged, cache the teacher again") from error


def require_same(
    subject: Path, cached: Mapping[str, Any], asked: Mapping[str, Any], remedy: str
) -> None:
    """Compare two dumps (draft, identity or a part of it) field by field.

    Raises:
        MismatchError: names the fields that differ, each with found and expected, then `remedy`.
    """
    found = list(_differences(cached, asked, ""))
    if not found:
        return
    # A digest says that something differs; a field beside it says what, so it is named first.
    found.sort(key=lambda line: line.split(" ", 1)[0].endswith("digest"))
    more = f", and {len(found) - 4} fields more" if len(found) > 4 else ""
    raise MismatchError(f"{subject}: {'; '.join(found[:4])}{more}. {remedy}")


def _differences(cached: Any, asked: Any, where: str) -> Iterator[str]:
    if isinstance(cached, Mapping) and isinstance(asked, Mapping):
        for key in sorted({*cached, *asked}):
            here = f"{where}.{key}" if where else str(key)
            yield from _differences(cached.get(key), asked.get(key), here)
    elif cached != asked:
        yield f"cached with {where} {_show(cached)}, asked for {_show(asked)}"


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) >= 32 and set(value) <= set("0123456789abcdef"):
        return f"{value[:8]}…"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
