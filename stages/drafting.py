"""What a cache is made from, and whether a cache that was begun is made from the same.

config, task, rows, tokenizer, teacher, examples -> Draft; config.yaml, manifest.json -> refusal

A setting that changes no number is free to change from session to session; everything else is
compared by content, so that no shard of one question stands among the shards of another.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.cache import (
    DRAFT,
    MANIFEST,
    Draft,
    Identity,
    Manifest,
    find_other,
    has_bases,
    read_draft,
    read_manifest,
    require_same,
)
from pipeline.cache.documents import read_json
from pipeline.capture_log import CaptureLog, list_libraries
from pipeline.config import canonical_json, parse_config
from pipeline.errors import CacheError, ConfigError, MismatchError, StillroomError
from pipeline.examples import Example
from pipeline.identity import digest_json, digest_tokenizer, digest_tokenizer_parts
from pipeline.runs import require_no_run, write_json
from pipeline.safe_loading import open_tokenizer
from pipeline.sentences import pooled_width
from pipeline.sources import Rows
from pipeline.tasks import Task
from pipeline.teacher import (
    CaptureSpec,
    Spool,
    Teacher,
    describe_files,
    describe_writing,
    read_settings,
)
from stages.hidden import make_signals, require_rows, require_targets
from stages.writing import lets_write

if TYPE_CHECKING:
    from stages.cache_teacher import CacheConfig

# Free to change from session to session, and why:
_FREE: Any = {
    "output": True,  # a cache does not know where it lies
    "on_error": True,  # shards that stand have no error, or say so
    "batch": True,  # which examples are asked together: rounding alone
    # Where the rows come from: they are compared themselves. What is told of them: no number.
    "data": {"source", "files", "options", "licence"},
    # Where the model lies: weights and settings are compared themselves. Device and way to compute
    # attention: rounding alone; a dtype that they bring along is part of the model.
    "teacher": {
        *("model", "revision", "licence"),
        *("device", "device_map", "attn_implementation"),
    },
}
_COMPUTE = ("torch", "transformers")  # of `list_libraries`: these compute a model
_LATER = ("code", "head", "generation")  # of a teacher: caches from before do not tell it
_SETTINGS = "teacher.json"  # in the cache's folder: to tell which of them differs
_REMEDY = "Cache into another output, or go back to those settings"


def make_draft(
    config: "CacheConfig",
    task: Task,
    rows: Rows,
    tokenizer: Any,
    teacher: Teacher,
    spec: CaptureSpec,
    spool: Spool,
) -> Draft:
    """What a cache is begun with.

    Args:
        task: with all that data, teacher and tokenizer complete of it.
        spec: what is asked of the teacher.
        spool: the examples.

    Raises:
        StillroomError: hidden states that cannot be kept so.
    """
    require_targets(config.hidden, task.features)
    signals = make_signals(
        config.hidden,
        spec.layers,
        spec.attention,
        teacher.width,
        pooled_width=pooled_width(teacher.model),
        head_width=None if teacher.head is None else int(teacher.head.weight.shape[1]),
    )
    shard_examples = config.shard.count(spec, teacher.width, spool)
    if not has_bases(config.output):
        require_rows(signals, spool.lengths[:shard_examples])
    return Draft(
        identity=Identity(
            data={**rows.description, "digest": rows.digest},
            preprocessing={"digest": spool.digest, "seed": config.seed},
            tokenizer=tokenizer_identity(tokenizer),
            teacher=_teacher_identity(config, task, teacher),
        ),
        task=task.settle(teacher.model).model_dump(mode="json"),
        targets=config.targets.resolve(teacher.num_classes),
        num_classes=teacher.num_classes,
        shifted=task.shifted,
        signals=signals,
        positions=config.hidden.positions,
        label_names=task.label_names,
        columns=spool.columns,
        shard_examples=shard_examples,
        num_examples=len(spool),
    )


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer by content, JSON values."""
    return {"digest": digest_tokenizer(tokenizer), "size": len(tokenizer)}


def require_same_settings(config: "CacheConfig") -> None:
    """Compare with the config that the cache in this folder was begun with, before any work.

    Raises:
        CacheError: that config is damaged, or the folder holds a run.
        MismatchError: names the settings that differ.
    """
    require_no_run(config.output)
    begun = any((config.output / name).is_file() for name in ("draft.json", "manifest.json"))
    stored = config.output / "config.yaml"
    if begun and stored.is_file():
        cached = _read_config(type(config), stored)
        old, new = (c.model_dump(mode="json", exclude=_FREE) for c in (cached, config))
        require_same(config.output, old, new, _REMEDY)


def _read_config(kind: type["CacheConfig"], file: Path) -> "CacheConfig":
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no settings")
        return parse_config(kind, raw, file.name)
    except ConfigError as error:
        raise MismatchError(
            f"{file.parent}: was begun by another command ({error}); cache into another output"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise CacheError(
            f"{file}: cannot be read ({' '.join(str(error).split())}); remove it, and the cache is"
            " compared as a whole"
        ) from error


def require_same_content(config: "CacheConfig", task: Task, rows: Rows, tokenizer: Any) -> Manifest:
    """Compare a finished cache with what the same settings mean today.

    The teacher's weights are read only where its files were touched since.

    Raises:
        MismatchError: names what changed.
    """
    manifest = read_manifest(config.output)
    cached = manifest.identity
    asked = {**rows.description, "digest": rows.digest}
    # What the teacher writes is not known before it has written.
    known = not lets_write(task, config.data)
    examples = task.examples(rows, tokenizer, config.data.carry) if known else ()
    _require_same_data(config.output, manifest, asked, examples)
    _require_same_tokenizer(config.output, cached.tokenizer, tokenizer)
    log = CaptureLog.read(config.output / "capture.json")
    if not log.teacher_files or log.teacher_files != describe_files(config.teacher):
        teacher = Teacher.load(config.teacher, task, task.num_classes(tokenizer))
        found = _teacher_identity(config, task, teacher)
        _require_same_teacher(config.output, cached.teacher, found, teacher)
    return manifest


def continue_draft(
    output: Path, draft: Draft, tokenizer: Any, teacher: Teacher, examples: Iterable[Example]
) -> Draft:
    """The draft as the cache in the folder was begun with it, where there is one.

    What differs harmlessly stays as it was begun: the bytes do not tell who went on.

    Args:
        examples: those that it speaks of.

    Raises:
        MismatchError: it was begun with other data, another tokenizer or teacher.
    """
    begun: Draft | None = None
    if (output / MANIFEST).is_file():
        begun = read_manifest(output)
    elif (output / DRAFT).is_file():
        begun = read_draft(output)
    if begun is None:
        settings = json.loads(canonical_json(read_settings(teacher.model)))
        write_json(output / _SETTINGS, settings)
        return draft
    cached, asked = begun.identity, draft.identity
    _require_same_data(output, begun, asked.data, examples)
    _require_same_tokenizer(output, cached.tokenizer, tokenizer)
    _require_same_teacher(output, cached.teacher, asked.teacher, teacher)
    same = {"data": cached.data, "teacher": cached.teacher}
    return draft.model_copy(update={"identity": asked.model_copy(update=same)})


def require_same_libraries(output: Path, log: CaptureLog) -> None:
    """Compare those of the session before, of which shards stand, with this session's.

    Another minor version of torch or transformers may compute a model otherwise, so that shards
    would differ by more than rounding. Patches may not; what another version of tokenizers does is
    seen in the tokens. A finished cache has nothing left to compute and is not asked.

    Raises:
        MismatchError: names both versions.
    """
    old, new = log.sessions[-1].get("libraries") if log.sessions else None, list_libraries()
    if old is not None:
        remedy = "Install those versions again to go on, or cache into another output"
        cached, asked = ({name: _minor(v[name]) for name in _COMPUTE} for v in (old, new))
        require_same(output, cached, asked, remedy)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _teacher_identity(config: "CacheConfig", task: Task, teacher: Teacher) -> dict[str, Any]:
    """A teacher by content; where it writes texts too, with how it writes them."""
    if not lets_write(task, config.data):
        return teacher.identity()
    return {**teacher.identity(), "generation": digest_json(describe_writing(teacher.model))}


def _require_same_data(
    output: Path, begun: Draft, asked: Mapping[str, Any], examples: Iterable[Example]
) -> None:
    """Rows of one digest are the same rows, wherever they come from."""
    cached = begun.identity.data
    if cached["digest"] == asked["digest"]:
        return
    other = find_other(output, begun, examples)
    named = "" if other is None else f"The first example that differs is {other!r}. "
    require_same(output, {"data": cached}, {"data": asked}, named + _REMEDY)


def _require_same_tokenizer(output: Path, cached: Mapping[str, Any], tokenizer: Any) -> None:
    asked = tokenizer_identity(tokenizer)
    if cached == asked:
        return
    old: Mapping[str, Any] = cached
    try:
        stored = open_tokenizer(output / "tokenizer")
    except StillroomError:
        stored = None
    if stored is not None and digest_tokenizer(stored) == cached["digest"]:
        old = {**cached, **digest_tokenizer_parts(stored)}
        asked |= digest_tokenizer_parts(tokenizer)
    require_same(output, {"tokenizer": old}, {"tokenizer": asked}, _REMEDY)


def _require_same_teacher(
    output: Path, cached: Mapping[str, Any], asked: Mapping[str, Any], teacher: Teacher
) -> None:
    known = {k: v for k, v in asked.items() if k in cached or k not in _LATER}
    old, file = dict(cached), output / _SETTINGS
    if old.get("config") != known["config"] and file.is_file():
        settings = read_json(file)
        if digest_json(settings) == old.get("config"):
            old["config"] = settings
            known["config"] = json.loads(canonical_json(read_settings(teacher.model)))
    require_same(output, {"teacher": old}, {"teacher": known}, _REMEDY)
