"""What a teacher is asked for in full, and whether it can be asked.

config, data -- with_needs, with_labels --> task, settings -- make_spec --> what is kept
examples -- check_fit, find_misfit --> those that the teacher can read
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.attention import name_attention
from pipeline.cache.codecs import Lossless
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.examples import Example
from pipeline.sources import Rows
from pipeline.tasks import Task
from pipeline.teacher import CaptureSpec, Spool, Teacher, require_isolation

if TYPE_CHECKING:
    from stages.cache_teacher import CacheConfig


def with_needs(config: "CacheConfig") -> "CacheConfig":
    """A task of numbers keeps all of them, bit for bit; one of pooled vectors keeps them as they
    are, and its one class."""
    task, hidden = config.task, config.hidden
    if task.numeric:
        whole = {"top_k": "all", "tail_draws": 0, "codec": Lossless()}
        return config.model_copy(update={"targets": config.targets.model_copy(update=whole)})
    if not task.pooled:
        return config
    if hidden.projection is not None or getattr(task, "width", None) is not None:
        raise ConfigError(
            f"task {task.name}: its vectors are the teacher's own; leave task.width and"
            " hidden.projection out"
        )
    kept = {
        "hidden": hidden.model_copy(update={"pooled": True}),
        "targets": config.targets.model_copy(update={"top_k": "all"}),
    }
    return config.model_copy(update=kept)


def with_labels(task: Task, rows: Rows) -> Task:
    """A classifying task knows its classes from the data where its config does not name them."""
    if not hasattr(task, "labels"):
        return task
    named = task.label_names
    if named is not None and rows.label_names is not None and named != rows.label_names:
        raise ConfigError(
            f"task.labels: {', '.join(named[:8])}, but the data's labels are"
            f" {', '.join(rows.label_names[:8])}; set data.label_names to the same list"
        )
    return task.model_copy(update={"labels": named or rows.label_names})


def find_misfit(
    teacher: Teacher, task: Task, gaps: Mapping[str, str], lenient: bool, example: Example
) -> str | None:
    """Why the teacher is not asked about an example, None where it is.

    Args:
        gaps: ids that are known to have no answer, and why.
        lenient: whether one that it cannot read is skipped; `check_fit` has found none otherwise.
    """
    if example.example_id in gaps or not lenient:
        return gaps.get(example.example_id)
    whole = task.segments == "parts"
    length = len(example.input_ids) if whole else int(example.segment_lengths.max(initial=0))
    limit = teacher.max_positions
    if limit is not None and length > limit:
        return f"is {length:,} tokens long, the teacher reads at most {limit:,}"
    rows = len(teacher.model.get_input_embeddings().weight)
    largest = int(example.input_ids.max(initial=0))
    return f"has token id {largest:,}, the teacher embeds {rows:,}" if largest >= rows else None


def check_fit(
    teacher: Teacher, task: Task, tokenizer: Any, spool: Spool, lenient: bool = False
) -> None:
    """Refuse examples that the teacher cannot read as they are.

    Args:
        lenient: they will be skipped one by one.

    Raises:
        DataError: an example is longer than the model.
        ModelError: unknown token ids, or packed documents that see one another.
    """
    name, length = spool.longest if task.segments == "parts" else spool.longest_document
    limit = teacher.max_positions
    if limit is not None and length > limit and not lenient:
        raise DataError(
            f"example {name!r}: is {length:,} tokens long, {teacher.name} reads at most {limit:,};"
            " shorten examples in the task's settings, or set on_error: skip"
        )
    rows = len(teacher.model.get_input_embeddings().weight)
    if spool.max_token >= rows and not lenient:
        raise ModelError(
            f"{teacher.name}: embeds {rows:,} token ids, the data hold id {spool.max_token:,};"
            " use the tokenizer that the model was trained with"
        )
    if spool.packed and task.segments == "documents":
        pad_id = tokenizer.pad_token_id or 0
        require_isolation(teacher.model, lambda examples: task.batch(examples, pad_id).inputs)


def make_spec(config: "CacheConfig", teacher: Teacher) -> CaptureSpec:
    """What a capture keeps of the teacher's answers.

    Raises:
        ConfigError: settings that the task or the teacher does not allow.
    """
    if config.hidden.pooled and config.task.segments == "streams":
        raise ConfigError(
            "hidden.pooled: an encoder and a decoder give no one vector of a text; keep layers"
        )
    targets = config.targets.resolve(teacher.num_classes)
    if targets.tail_draws and not config.task.draws:
        raise ConfigError(
            f"targets.tail_draws: {targets.tail_draws}, but {config.task.name} rules classes out"
            " that a draw could hit; set it to 0 and raise top_k"
        )
    return CaptureSpec(
        top_k=int(targets.top_k),
        tail_draws=targets.tail_draws,
        temperatures=targets.temperatures,
        layers=teacher.name_layers(config.hidden.layers),
        attention=name_attention(teacher.model, config.hidden.qkv),
        head=config.hidden.head,
        pooled=config.hidden.pooled,
        hidden_dtype=teacher.model.dtype,
    )
