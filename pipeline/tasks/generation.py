"""Texts that a model writes by itself: beams, greedy or drawn, by transformers' own names.

Decoding + token ids of prompts -> generate_texts -> [[text, ...] of each prompt]
Writer -- prompts, write --> a teacher's texts, which its `examples` learn as targets
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from transformers import GenerationConfig

from pipeline.config import StrictModel
from pipeline.tasks.base import Task, pad_rows
from pipeline.text_metrics import TextMetric


class Decoding(StrictModel):
    """How a text is chosen; what is None is as the model's own generation config says.

    Attributes:
        max_new_tokens: of a text at most.
        num_beams: 1 is greedy, or drawn.
        do_sample, temperature, top_k, top_p: draw each token instead of taking the best.
        length_penalty: above 1 beams prefer longer texts.
        no_repeat_ngram_size, repetition_penalty: against loops.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    num_beams: int = Field(default=1, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(default=None, gt=0.0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = Field(default=None, ge=1)
    repetition_penalty: float | None = Field(default=None, gt=0.0)

    @property
    def count(self) -> int:
        """Texts for each prompt."""
        return 1

    def settings(self) -> dict[str, Any]:
        """As transformers' GenerationConfig takes them."""
        own = {name: getattr(self, name) for name in Decoding.model_fields}
        return {name: value for name, value in own.items() if value is not None}


class Generation(Decoding):
    """The teacher's own texts as targets: distillation of sequences (Kim & Rush 2016).

    Attributes:
        num_return_sequences: texts for each source, examples of their own (`id#0`, `id#1`).
        splits: the splits whose targets are generated; others keep their references, so that
            held-out numbers compare.
        batch_size: sources at a time.
    """

    num_return_sequences: int = Field(default=1, ge=1)
    splits: list[Literal["train", "validation", "test"]] = Field(default=["train"], min_length=1)
    batch_size: int = Field(default=16, ge=1)

    @property
    def count(self) -> int:
        """See `Decoding.count`."""
        return self.num_return_sequences

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} is more than num_beams"
                f" {self.num_beams}; raise num_beams, or set do_sample"
            )
        return self


class Evaluate(Decoding):
    """What a model writes for held-out sources, and how it is compared with the references.

    Attributes:
        metrics: chrf, bleu, rouge.
        bleu_tokenizer: sacrebleu's: 13a, intl, zh, ja-mecab, char, none, ...
    """

    metrics: list[TextMetric] = Field(default=["chrf", "bleu"], min_length=1)
    bleu_tokenizer: str = "13a"


class Writer(Task):
    """A task whose targets its teacher may write; rows then bring `generated` too.

    Attributes:
        targets: references, those of the data, or generated, the teacher's own.
        generation: how they are generated.
    """

    targets: Literal["references", "generated"] = "references"
    generation: Generation = Generation()

    @abstractmethod
    def prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Token ids that texts go on from and those that an encoder reads; see `generate_texts`."""

    def writes(self, split: str) -> tuple[str, Decoding] | None:
        """The column that the teacher writes in a split, and how; None where it writes nothing."""
        if self.targets == "generated" and split in self.generation.splits:
            return "generated", self.generation
        return None

    def write(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        decoding: Decoding,
        seed: int,
    ) -> list[list[str]]:
        """A model's own texts for some rows, `decoding.count` of each."""
        prompts, sources = self.prompts(rows, tokenizer)
        return generate_texts(model, tokenizer, prompts, decoding, sources, seed)


@torch.inference_mode()
def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    sources: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> list[list[str]]:
    """What a model writes after each prompt, without the prompt and special tokens.

    What goes on from a text keeps its white space; a text of its own has none around it.

    Args:
        model: in evaluation mode.
        prompts: token ids that the text goes on from; with sources, the decoder's first tokens, the
            same number of them for all.
        sources: what the encoder reads, for a model that has one.
        seed: of what is drawn; the caller's random state is left as it is.
    """
    device = model.get_input_embeddings().weight.device
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if sources is None:
        ids, mask = _fill_left(prompts, pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
    else:
        ids, mask = pad_rows(sources, pad_id)
        starts = torch.from_numpy(np.stack(prompts).astype(np.int64))
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": starts}
    config = GenerationConfig(
        **decoding.settings(),
        num_return_sequences=decoding.count,
        pad_token_id=pad_id,
        eos_token_id=_ends(model, tokenizer),
        decoder_start_token_id=None if sources is None else int(prompts[0][0]),
        use_cache=_fits_cache(model.config),
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        written = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=config,
        )
    begins = inputs["input_ids" if sources is None else "decoder_input_ids"].shape[1]
    texts = tokenizer.batch_decode(written[:, begins:].cpu(), skip_special_tokens=True)
    if sources is not None:
        texts = [text.strip() for text in texts]
    size = decoding.count
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _fill_left(rows: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pad_rows`, but on the left, so that every text goes on at the same place."""
    ids, mask = pad_rows([row[::-1] for row in rows], pad_id)
    return ids.flip(1), mask.flip(1)


def _fits_cache(config: Any) -> bool:
    """transformers gives T5's decoder a key-value cache of as many layers as the encoder has."""
    deeper = getattr(config, "num_decoder_layers", None) or 0
    return deeper <= int(config.get_text_config().num_hidden_layers)


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """The tokens that end a text: the tokenizer's mark, and those of the model, maybe of a chat."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends) or None
