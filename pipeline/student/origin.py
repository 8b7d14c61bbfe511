"""Where a student comes from: the three kinds of `student:` in a config."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from pipeline.config import StrictModel
from pipeline.errors import ConfigError, did_you_mean
from pipeline.student.lora import LoRA


class FromScratch(StrictModel):
    """A new model of a transformers architecture (or one of ours), from a few numbers.

    Attributes:
        architecture: a transformers model type, for instance llama, gpt2, bert; or hashed-bag.
        layers, hidden_size, heads, intermediate_size: as their names say; the architecture's own
            default where left out. With an encoder and a decoder, of both.
        decoder_layers: of the decoder, where it should not have as many as the encoder.
        dropout: every dropout rate the architecture has.
        settings: anything else of the architecture's own configuration.
        tokenizer: settings of the tokenizer that hashed-bag brings (buckets, ngram_sizes).
    """

    source: Literal["scratch"] = Field(default="scratch", alias="from")
    architecture: str
    layers: int | None = None
    decoder_layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    intermediate_size: int | None = None
    dropout: float | None = None
    settings: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}


class FromPretrained(StrictModel):
    """A checkpoint: a hub name or a folder, for instance an earlier student; `lora` adapts it."""

    source: Literal["pretrained"] = Field(default="pretrained", alias="from")
    model: str
    revision: str | None = None
    dropout: float | None = None
    lora: LoRA | None = None


class FromTeacher(StrictModel):
    """A pruned teacher: its embeddings, its head and copies of the chosen layers.

    Attributes:
        model: where the teacher's weights are (hub name or folder).
        layers: the teacher's layers to copy, in order, counted from 0; all where left out.
        decoder_layers: the same of the decoder, of a teacher that has an encoder too; then `layers`
            are the encoder's. Shleifer & Rush (2020) keep the encoder and prune the decoder.
        lora: learn adapters beside these layers instead of their weights.
    """

    source: Literal["teacher"] = Field(default="teacher", alias="from")
    model: str
    layers: list[int] | None = Field(default=None, min_length=1)
    decoder_layers: list[int] | None = Field(default=None, min_length=1)
    revision: str | None = None
    dropout: float | None = None
    lora: LoRA | None = None

    @model_validator(mode="after")
    def _check_pruned(self) -> Self:
        if self.layers is None and self.decoder_layers is None:
            raise ValueError("student.layers: name the teacher's layers to copy")
        return self


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
