"""The JSON files of a cache: sealed, read, validated, and compared field by field.

    {..., "checksum": "000…0"} -- sha256 of these bytes, in place of the zeros --> write_sealed

What a newer Stillroom may have written is either passed over or refused, never guessed at: a new
key at the top is optional, unless `requires` names it or `version` is higher; below the top every
key says how numbers are read, so that an unknown one is refused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config import Model, parse_config
from pipeline.errors import CacheError, ConfigError, MismatchError, say
from pipeline.storage import is_local, read_small, write_bytes

SEAL = "checksum"
_REMEDY = "mend it with `stillroom verify --repair`, or cache the teacher again"
_BLANK = b"0" * 64
_DEEPEST = 32

VERSION: Literal[1] = 1
KNOWN: frozenset[str] = frozenset()  # what `requires` may name; a later addition joins here


def write_sealed(file: Path, content: Mapping[str, Any], beside: Path | None = None) -> str:
    """Write a JSON object with the checksum of its own bytes, there whole or not at all.

    Args:
        beside: see `write_bytes`.

    Returns:
        sha256 of the file, in hex.
    """
    sealed = {**content, SEAL: _BLANK.decode()}
    text = (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode()
    before, _, after = text.rpartition(_BLANK)
    whole = before + hashlib.sha256(text).hexdigest().encode() + after
    write_bytes(file, whole, beside)
    return hashlib.sha256(whole).hexdigest()


def read_json(
    file: Path, require_seal: bool | str = False, remedy: str = _REMEDY
) -> dict[str, Any]:
    """Read a JSON object, and compare its checksum, which is left out, with its bytes.

    Args:
        require_seal: refuse a file without a checksum, as those of before it are; a name refuses
            those that have a key of that name.
        remedy: what to do about a damaged file.

    Raises:
        CacheError: missing, damaged, or no object.
    """
    return read_hashed(file, require_seal, remedy)[0]


def read_hashed(
    file: Path, require_seal: bool | str = False, remedy: str = _REMEDY
) -> tuple[dict[str, Any], str]:
    """The same, and the sha256 of its bytes, in hex.

    What comes torn from a store is asked for once more.
    """
    for again in (False, True):
        try:
            content = read_small(file)
        except (OSError, ValueError) as error:
            raise CacheError(f"{file}: cannot be read ({say(error)}); {remedy}") from error
        try:
            raw = parse_json(file, content, require_seal, remedy)
            return raw, hashlib.sha256(content).hexdigest()
        except CacheError:
            if again or is_local(file):
                raise
    raise AssertionError("the second time it returns or raises")


def parse_json(
    file: Path, content: bytes, require_seal: bool | str = False, remedy: str = _REMEDY
) -> dict[str, Any]:
    """The same, where the bytes have been read."""
    try:
        raw = json.loads(content.decode("utf-8"))
        _require_sane(raw, content)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{file}: cannot be read ({say(error)}); {remedy}") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{file}: holds no object; {remedy}")
    required = require_seal in raw if isinstance(require_seal, str) else require_seal
    if SEAL in raw or required:
        checksum = str(raw.pop(SEAL, None)).encode("ascii", "replace")
        blank = content.replace(checksum, _BLANK) if len(checksum) == len(_BLANK) else b""
        if hashlib.sha256(blank).hexdigest().encode() != checksum:
            raise CacheError(f"{file}: cannot be read (it fails its checksum); {remedy}")
    return raw


def _require_sane(raw: Any, content: bytes) -> None:
    """Refuse what JSON allows and nothing here can hold: nests without end, halves of letters."""
    level = [raw] if isinstance(raw, dict | list) else []
    for _ in range(_DEEPEST):
        nodes = [node.values() if isinstance(node, dict) else node for node in level]
        level = [child for node in nodes for child in node if isinstance(child, dict | list)]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if b"\\ud" in content.lower():
        json.dumps(raw, ensure_ascii=False).encode()  # a UnicodeError is a ValueError


def parse_document(
    model: type[Model], raw: dict[str, Any], file: Path, *, whole: bool = False
) -> Model:
    """Validate what `read_json` read, without the keys at its top that nobody knows yet.

    Args:
        whole: refuse those too: what is to be continued must be understood to the last key.

    Raises:
        CacheError: a newer format, or the first thing wrong.
    """
    _require_known(raw, file)
    known = {name: value for name, value in raw.items() if whole or name in model.model_fields}
    try:
        return parse_config(model, known, str(file))
    except (ConfigError, ValidationError) as error:
        raise CacheError(f"{error}; the file is damaged, cache the teacher again") from error


def _require_known(raw: Mapping[str, Any], file: Path) -> None:
    remedy = "install a newer Stillroom, or cache the teacher again with this one"
    version, requires = raw.get("version"), raw.get("requires", [])
    if isinstance(version, int) and version > VERSION:
        raise CacheError(
            f"{file}: cache format {version}, this Stillroom reads up to {VERSION}; {remedy}"
        )
    unknown = [name for name in requires if name not in KNOWN] if isinstance(requires, list) else []
    if unknown or not isinstance(requires, list):
        found = _show(unknown[0] if unknown else requires)
        raise CacheError(f"{file}: requires {found}, which this Stillroom does not know; {remedy}")


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
    found.sort(key=_rank)
    more = f", and {len(found) - 4} fields more" if len(found) > 4 else ""
    raise MismatchError(f"{subject}: {'; '.join(found[:4])}{more}. {remedy}")


def _rank(line: str) -> tuple[bool, bool]:
    """A digest says that something differs; a field beside it says what, so it is named first, and
    before all others what brings them with it: another task, another teacher."""
    where = line.split(" ")[2]
    source = where == "task.name" or "teacher" in where.split(".")
    return where.endswith("digest"), not source


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
