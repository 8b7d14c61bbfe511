"""Tiny models with an encoder and a decoder, and pairs of texts for them, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from small_teachers import make_tokenizer, save_teacher, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from stages.cache_teacher import CacheConfig, cache_teacher

BOS, EOS = 0, 1
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
_BART = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "pad_token_id": EOS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}


def make_word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A token for each word, so that what a model of random weights writes is read as it was."""
    words = ["<s>", "</s>", *NUMBERS, *ZAHLEN, "user", "assistant"]
    backend = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, "<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**marks, **options})


def make_t5(**changes: Any) -> PreTrainedModel:
    """Two layers and three of the decoder, width 32, a head of 300 rows tied to the embeddings."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "initializer_factor": 2.0,
        "pad_token_id": EOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": BOS,
    }
    model: PreTrainedModel = T5ForConditionalGeneration(T5Config(**(sizes | changes))).eval()
    return model


def make_bart(**changes: Any) -> PreTrainedModel:
    """Two layers each of width 32, with a bias on its logits that is not learned."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**(_BART | changes))).eval()
    model.final_logits_bias.normal_()
    return model


def make_mbart() -> PreTrainedModel:
    """As `make_bart`; its decoder begins with the last token of the target."""
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(MBartConfig(**_BART | {"pad_token_id": BOS})).eval()
    model.final_logits_bias.normal_()
    return model


MAKERS = {"t5": make_t5, "bart": make_bart, "mbart": make_mbart}


def make_pairs(count: int) -> list[dict[str, str]]:
    """Numbers in English and German, three to eight of them."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for number in range(count):
        picks = torch.randint(10, (3 + number % 6,), generator=generator).tolist()
        texts = (" ".join(words[pick] for pick in picks) for words in (NUMBERS, ZAHLEN))
        source, target = texts
        language = "north" if number % 3 else "south"
        pairs.append({"id": f"pair {number}", "en": source, "de": target, "language": language})
    return pairs


def make_pair_data(root: Path, train: int = 22, test: int = 8) -> dict[str, Any]:
    """Pairs in two files, as a config names them."""
    pairs = make_pairs(train + test)
    write_rows(root / "train.jsonl", pairs[:train])
    write_rows(root / "test.jsonl", pairs[train:])
    return {
        "source": "json",
        "files": {name: str(root / f"{name}.jsonl") for name in ("train", "test")},
        "splits": {"train": "train", "test": "test"},
        "columns": {"source": "en", "target": "de"},
        "carry": ["language"],
    }


def make_translation_config(
    root: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> CacheConfig:
    """A cache of a model in root/teacher with every class kept, exactly."""
    if not (root / "teacher").exists():
        save_teacher(root / "teacher", model, tokenizer or make_tokenizer())
    settings: dict[str, Any] = {
        "output": str(root / "cache"),
        "task": {"name": "seq2seq"},
        "data": make_pair_data(root),
        "teacher": {"model": str(root / "teacher")},
        "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
        "hidden": {"layers": [0, -1], "dtype": "float32"},
        "batch": {"tokens": 256},
        "shard": {"examples": 16},
    }
    return CacheConfig.model_validate(settings | changes)


def make_translation_cache(root: Path, model: PreTrainedModel, **changes: Any) -> Path:
    """The finished cache of `make_translation_config`."""
    return cache_teacher(make_translation_config(root, model, **changes), progress=False)
