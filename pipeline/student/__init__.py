"""Students: from a few numbers, from a pretrained checkpoint, or from chosen layers of a teacher.

Whatever the origin, the result is a transformers model that `AutoModel....from_pretrained` opens.
"""

import copy
import fnmatch
import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import nn

from pipeline.config import StrictModel
from pipeline.errors import ConfigError, ModelError, did_you_mean
from pipeline.student.bag import HashedBagConfig
from pipeline.student.ngrams import HashedNgramTokenizer
from pipeline.tasks.base import Task


class FromScratch(StrictModel):
    """A new model of a transformers architecture (or one of ours), from a few numbers.

    Attributes:
        architecture: a transformers model type, for instance llama, gpt2, bert; or hashed-bag.
        layers, hidden_size, heads, intermediate_size: as their names say; the architecture's own
            default where left out.
        dropout: every dropout rate the architecture has.
        settings: anything else of the architecture's own configuration.
        tokenizer: settings of the tokenizer that hashed-bag brings (buckets, ngram_sizes).
    """

    source: Literal["scratch"] = Field(default="scratch", alias="from")
    architecture: str
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    intermediate_size: int | None = None
    dropout: float | None = None
    settings: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}


class FromPretrained(StrictModel):
    """A checkpoint: a hub name or a folder, for instance an earlier student."""

    source: Literal["pretrained"] = Field(default="pretrained", alias="from")
    model: str
    revision: str | None = None
    dropout: float | None = None


class FromTeacher(StrictModel):
    """A pruned teacher: its embeddings, its head and copies of the chosen layers.

    Attributes:
        model: where the teacher's weights are (hub name or folder).
        layers: the teacher's layers to copy, in order, counted from 0.
    """

    source: Literal["teacher"] = Field(default="teacher", alias="from")
    model: str
    layers: list[int] = Field(min_length=1)
    revision: str | None = None
    dropout: float | None = None


StudentOrigin = FromScratch | FromPretrained | FromTeacher
_ORIGINS: dict[str, type[StudentOrigin]] = {
    "scratch": FromScratch,
    "pretrained": FromPretrained,
    "teacher": FromTeacher,
}


def _pick_origin(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    origin = value.get("from", value.get("source"))
    if origin not in _ORIGINS:
        hint = did_you_mean(str(origin), _ORIGINS)
        raise ConfigError(f"student.from {origin!r} is not known{hint}")
    numbers = {key: setting for key, setting in value.items() if key != "source"}
    return _ORIGINS[origin].model_validate({**numbers, "from": origin})


Origin = Annotated[StudentOrigin, BeforeValidator(_pick_origin), SerializeAsAny()]


def build_student(
    origin: StudentOrigin, task: Task, num_classes: int, tokenizer: Any, seed: int
) -> transformers.PreTrainedModel:
    """Make the student, in float32, deterministically from the seed.

    Args:
        origin: where it comes from.
        task: names the transformers Auto class.
        num_classes: V; the head has at least as many rows.
        tokenizer: what the student reads; its size is the vocabulary of a new model.

    Raises:
        ConfigError: the architecture or a layer does not exist.
        ModelError: a checkpoint is missing, or of another architecture or class space.
    """
    torch.manual_seed(seed)
    if isinstance(origin, FromScratch):
        return _from_scratch(origin, task, num_classes, tokenizer)
    model = load_model(origin.model, task, num_classes, origin.revision, origin.dropout)
    if isinstance(origin, FromTeacher):
        _keep_layers(model, origin)
    return model


def load_model(
    name: str,
    task: Task,
    num_classes: int,
    revision: str | None = None,
    dropout: float | None = None,
) -> transformers.PreTrainedModel:
    """Open a checkpoint with the task's Auto class, in float32.

    Raises:
        ModelError: it is missing, of an architecture without that head, or has too few classes.
    """
    auto = getattr(transformers, task.auto_class)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        if dropout is not None:
            _set_dropout(config, dropout)
        if task.head == "sequence":
            config.num_labels = num_classes
        model = auto.from_pretrained(name, revision=revision, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: cannot be opened as {task.auto_class} ({first})") from error
    check_classes(model, task, num_classes, name)
    return model


def check_classes(model: nn.Module, task: Task, num_classes: int, name: str) -> None:
    """Refuse a head with fewer rows than there are classes."""
    config: Any = model.config
    rows = config.num_labels if task.head == "sequence" else config.vocab_size
    if rows < num_classes:
        raise ModelError(
            f"{name}: has {rows:,} classes, the cache has {num_classes:,}; choose a student whose"
            " head covers the cached class space, or cache the teacher with this tokenizer"
        )


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Stop training of the parameters whose names match a pattern (`*` and `?`); return their
    count.

    Raises:
        ConfigError: a pattern matches no parameter (with the nearest name).
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise ConfigError(
                f"freeze {pattern!r} matches no parameter{did_you_mean(pattern, parameters)}"
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    return sum(p.numel() for p in parameters.values() if not p.requires_grad)


def _from_scratch(
    origin: FromScratch, task: Task, num_classes: int, tokenizer: Any
) -> transformers.PreTrainedModel:
    known = transformers.CONFIG_MAPPING
    if origin.architecture not in known:
        raise ConfigError(
            f"student.architecture {origin.architecture!r} is not known"
            f"{did_you_mean(origin.architecture, known)}"
        )
    wanted = {
        "hidden_size": origin.hidden_size,
        "num_hidden_layers": origin.layers,
        "num_attention_heads": origin.heads,
        "num_key_value_heads": origin.heads,
        "intermediate_size": origin.intermediate_size,
    }
    accepted = _settings_of(known[origin.architecture])
    numbers = {k: v for k, v in wanted.items() if v is not None and k in accepted}
    rows = max(num_classes, len(tokenizer)) if task.head == "tokens" else len(tokenizer)
    numbers["vocab_size"] = rows
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        numbers[token] = getattr(tokenizer, token)
    if task.head == "sequence":
        numbers["num_labels"] = num_classes
    config = transformers.AutoConfig.for_model(origin.architecture, **numbers | origin.settings)
    if origin.dropout is not None:
        _set_dropout(config, origin.dropout)
    auto = getattr(transformers, task.auto_class)
    try:
        return auto.from_config(config).float()
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"student.architecture {origin.architecture!r}: no {task.auto_class} ({first[:200]})"
        ) from error


def _settings_of(config_class: Any) -> set[str]:
    own = set(inspect.signature(config_class.__init__).parameters)
    return own | set(config_class.attribute_map) | set(vars(config_class()))


def _set_dropout(config: Any, rate: float) -> None:
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float | int):
            setattr(config, name, rate)


def _keep_layers(model: transformers.PreTrainedModel, origin: FromTeacher) -> None:
    """Replace the model's list of layers by copies of the chosen ones."""
    total = model.config.num_hidden_layers
    for layer in origin.layers:
        if not 0 <= layer < total:
            raise ConfigError(
                f"student.layers: {origin.model} has no layer {layer}; it has 0 to {total - 1}"
            )
    owner, name, layers = _layer_list(model, total)
    kept = nn.ModuleList(copy.deepcopy(layers[index]) for index in origin.layers)
    for position, copied in enumerate(kept):
        for module in copied.modules():
            if hasattr(module, "layer_idx"):  # where the key-value cache of this layer stands
                setattr(module, "layer_idx", position)  # noqa: B010  (not an attribute of nn.Module)
    setattr(owner, name, kept)
    model.config.num_hidden_layers = len(kept)
    for per_layer in ("layer_types", "sliding_window_pattern"):
        values = getattr(model.config, per_layer, None)
        if isinstance(values, list) and len(values) == total:
            setattr(model.config, per_layer, [values[index] for index in origin.layers])


def _layer_list(model: nn.Module, total: int) -> tuple[nn.Module, str, nn.ModuleList]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                return owner, name, child
    raise ModelError(f"{type(model).__name__}: has no list of {total} layers that could be pruned")


def own_tokenizer(origin: StudentOrigin) -> Any:
    """The tokenizer a student brings along: a checkpoint's, or that of the hashed bag.

    Returns:
        None where a new model or a pruned teacher reads what the teacher reads.

    Raises:
        ModelError: the checkpoint has no tokenizer.
    """
    if isinstance(origin, FromTeacher):
        return None
    if isinstance(origin, FromScratch):
        if origin.architecture == HashedBagConfig.model_type:
            return HashedNgramTokenizer(**origin.tokenizer)
        if origin.tokenizer:
            raise ConfigError(
                f"student.tokenizer: {origin.architecture} reads the cache's tokens; leave it out"
            )
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(origin.model, revision=origin.revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{origin.model}: has no tokenizer ({first})") from error
