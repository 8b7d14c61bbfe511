"""What a cache is made from, and whether a cache that was begun is made from the same.

config, task, rows, tokenizer, teacher, examples -> Draft; config.yaml, manifest.json -> refusal

A setting that changes no number is free to change from session to session; everything else is
compared by content, so that no shard of one question stands among the shards of another.
"""

from typing import TYPE_CHECKING, Any

import yaml

from pipeline.cache import Draft, Identity, Manifest, read_manifest, require_same
from pipeline.capture import CaptureLog
from pipeline.identity import digest_tokenizer
from pipeline.sentences import pooled_width
from pipeline.sources import Rows
from pipeline.tasks import Task
from pipeline.teacher import CaptureSpec, Spool, Teacher, describe_files
from stages.hidden import make_signals, require_rows, require_targets

if TYPE_CHECKING:
    from stages.cache_teacher import CacheConfig

# How a capture runs, not what it keeps: free to change from session to session.
_FREE: Any = {
    "output": True,
    "batch": True,
    "data": {"licence"},
    "teacher": {"device", "device_map", "attn_implementation", "licence"},
}
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
    require_rows(signals, spool.lengths[:shard_examples])
    return Draft(
        identity=Identity(
            data={**rows.description, "digest": rows.digest},
            preprocessing={"digest": spool.digest, "seed": config.seed},
            tokenizer=tokenizer_identity(tokenizer),
            teacher=teacher.identity(),
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
        MismatchError: names the settings that differ.
    """
    begun = any((config.output / name).is_file() for name in ("draft.json", "manifest.json"))
    stored = config.output / "config.yaml"
    if begun and stored.is_file():
        cached = type(config).model_validate(yaml.safe_load(stored.read_text(encoding="utf-8")))
        old, new = (c.model_dump(mode="json", exclude=_FREE) for c in (cached, config))
        require_same(config.output, old, new, _REMEDY)


def require_same_content(config: "CacheConfig", task: Task, rows: Rows, tokenizer: Any) -> Manifest:
    """Compare a finished cache with what the same settings mean today.

    The teacher's weights are read only where its files were touched since.

    Raises:
        MismatchError: names what changed.
    """
    manifest = read_manifest(config.output)
    cached = manifest.identity
    require_same(config.output, cached.data, {**rows.description, "digest": rows.digest}, _REMEDY)
    require_same(config.output, cached.tokenizer, tokenizer_identity(tokenizer), _REMEDY)
    log = CaptureLog.read(config.output / "capture.json")
    if not log.teacher_files or log.teacher_files != describe_files(config.teacher):
        teacher = Teacher.load(config.teacher, task, task.num_classes(tokenizer))
        require_same(config.output, cached.teacher, teacher.identity(), _REMEDY)
    return manifest
