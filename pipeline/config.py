"""YAML files and `--set a.b=value` in, frozen pydantic models out, and one line when they do not
fit.

A family (losses, tasks, codecs) is a dict of members, each its own configuration; `member_of` turns
the dict into a field type that picks the member by its `name`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError

from pipeline.errors import ConfigError, did_you_mean


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 3e-4 for a text, because it has no point; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def member_of(family: Mapping[str, type[Model]], kind: str) -> Any:
    """The Annotated metadata of a field that holds any member of a family, chosen by its `name`.

    Use as `Annotated[Loss, *member_of(LOSSES, "loss")]`. Subclass fields are kept when dumped.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value
        name = value.get("name")
        if not isinstance(name, str) or name not in family:
            raise ConfigError(f"{kind} {name!r} is not known{did_you_mean(str(name), family)}")
        return parse_config(family[name], value, f"{kind} {name!r}")

    return BeforeValidator(pick), SerializeAsAny()  # type: ignore[type-arg]


def load_config(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read a YAML file into a model after applying `section.key=value` overrides.

    Raises:
        ConfigError: the file is missing or is no mapping, a key is unknown (with the nearest name),
            or a value does not fit.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a config file"
        ) from error
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise ConfigError(f"{path}: is no valid YAML ({line})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds {type(raw).__name__}, expected a mapping of settings")
    for override in overrides:
        _apply(raw, override)
    return parse_config(model, raw, str(path))


def parse_config(model: type[Model], raw: Mapping[str, Any], subject: str) -> Model:
    """Validate a mapping; the first thing wrong is reported as one line about `subject`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{subject}: {_first_complaint(model, error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{subject}: {error}") from error


def parse_value(text: str) -> Any:
    """The value that a text on the command line means, as a config file would read it.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no value that YAML can read; quote it") from error


def dump_config(config: BaseModel) -> str:
    """The resolved config, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def canonical_json(value: Any) -> str:
    """One text for one value, for digests: sorted keys, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected section.key=value")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = parse_value(text)
    elif isinstance(node, dict):
        node[last] = parse_value(text)
    else:
        section = ".".join(parents)
        raise ConfigError(
            f"--set {override}: {section} is a plain value, not a section; set all of it, for"
            f' instance --set "{section}={{name: {node}, {last}: {text}}}"'
        )


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: nothing below a plain value can be set")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override}: {part!r} is no index into a list of {len(node)}")
    return int(part)


def _first_complaint(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, key = first["loc"]
        owner = _model_at(error, model, parents)
        return f"unknown key {where!r}{did_you_mean(str(key), owner.model_fields)}"
    if first["type"] == "missing":
        return f"{where} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    found = first["input"]
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) else ""
    return f"{where}: {message}{shown}" if where else message


def _model_at(
    error: ValidationError, model: type[BaseModel], parents: Iterable[Any]
) -> type[BaseModel]:
    """Follow a location down the models' annotations to the model that owns the last key."""
    here = next((m for m in _models_in(model) if m.__name__ == error.title), model)
    choices: dict[Any, type[BaseModel]] = {}
    for part in parents:
        if part in choices:  # of several models that a field may hold, the one that was meant
            here = choices[part]
        elif part in here.model_fields:
            choices = {m.__name__: m for m in _models_in(here.model_fields[part].annotation)}
            here = next(iter(choices.values()), here)
    return here


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
