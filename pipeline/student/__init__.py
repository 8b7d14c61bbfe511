"""Students: from a few numbers, from a pretrained checkpoint, or from chosen layers of a teacher.

Whatever the origin, the result is a transformers model that `AutoModel....from_pretrained` opens.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from pipeline.errors import ConfigError, ModelError, did_you_mean
from pipeline.safe_loading import NO_CODE
from pipeline.sentences import head_of
from pipeline.student.bag import HashedBagConfig
from pipeline.student.loading import load_model, set_dropout
from pipeline.student.lora import Adapters
from pipeline.student.ngrams import HashedNgramTokenizer
from pipeline.student.origin import FromPretrained, FromScratch, FromTeacher, Origin, StudentOrigin
from pipeline.student.probing import require_causal
from pipeline.student.pruning import keep_layers
from pipeline.tasks.base import Task

__all__ = [
    "Adapters",
    "FromPretrained",
    "FromScratch",
    "FromTeacher",
    "Origin",
    "StudentOrigin",
    "add_adapters",
    "build_student",
    "load_model",
    "name_labels",
    "own_tokenizer",
]


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
        keep_layers(model, origin.layers, origin.decoder_layers, origin.model)
    for name, value in task.model_settings(tokenizer).items():
        setattr(model.config, name, value)
        if hasattr(model, "generation_config"):
            setattr(model.generation_config, name, value)
    return model


def add_adapters(
    origin: StudentOrigin, model: transformers.PreTrainedModel, task: Task
) -> Adapters | None:
    """Put the adapters beside a model's layers that its config asks for; None where it does not."""
    lora = None if isinstance(origin, FromScratch) else origin.lora
    if lora is None:
        return None
    adapters = lora.adapt(model, task.auto_class)
    if (head := head_of(model)) is not None:
        head.requires_grad_(True)  # a new dense layer learns as a whole
    return adapters


def name_labels(model: transformers.PreTrainedModel, names: Sequence[str] | None) -> None:
    """Write the names of the classes, in order, into the model's config."""
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}


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
    if task.auto_class == "AutoModelForSeq2SeqLM":
        wanted |= _stack_sizes(origin)
    accepted = _settings_of(known[origin.architecture])
    numbers = {k: v for k, v in wanted.items() if v is not None and k in accepted}
    rows = max(num_classes, len(tokenizer)) if task.vocabulary else len(tokenizer)
    numbers["vocab_size"] = rows
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        numbers[token] = getattr(tokenizer, token)
    if (labels := task.num_labels()) is not None:
        numbers["num_labels"] = labels
    numbers |= task.model_settings(tokenizer)
    if "forced_eos_token_id" in accepted:  # else an id of the architecture's own tokenizer
        numbers["forced_eos_token_id"] = tokenizer.eos_token_id
    config = transformers.AutoConfig.for_model(origin.architecture, **numbers | origin.settings)
    if origin.dropout is not None:
        set_dropout(config, origin.dropout)
    auto = getattr(transformers, task.auto_class)
    try:
        model = auto.from_config(config).float()
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"student.architecture {origin.architecture!r}: no {task.auto_class} ({first[:200]})"
        ) from error
    require_causal(model, task, origin.architecture)
    task.equip(model)
    return model


def _stack_sizes(origin: FromScratch) -> dict[str, int | None]:
    """The sizes by the names that models with an encoder and a decoder give them."""
    decoder_layers = origin.layers if origin.decoder_layers is None else origin.decoder_layers
    head_size = origin.hidden_size and origin.heads and origin.hidden_size // origin.heads
    return {
        "encoder_layers": origin.layers,
        "decoder_layers": decoder_layers,
        "num_decoder_layers": decoder_layers,
        "encoder_attention_heads": origin.heads,
        "decoder_attention_heads": origin.heads,
        "encoder_ffn_dim": origin.intermediate_size,
        "decoder_ffn_dim": origin.intermediate_size,
        "d_ff": origin.intermediate_size,
        "d_kv": head_size,
    }


def _settings_of(config_class: Any) -> set[str]:
    own = set(inspect.signature(config_class.__init__).parameters)
    return own | set(config_class.attribute_map) | set(vars(config_class()))


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
        return transformers.AutoTokenizer.from_pretrained(
            origin.model, revision=origin.revision, **NO_CODE
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{origin.model}: has no tokenizer ({first})") from error
