"""Tiny teachers with random weights, their tokenizers and data, made on the spot."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stages.cache_teacher import CacheConfig

TEXT = "the still room holds many bottles and one teacher speaks once to all the students"
WORDS = TEXT.split()
TOPICS = ["science", "sports", "travel"]


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, every byte among them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**marks, **options})


def make_llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers of width 32, a head of 304 rows, sharp enough to have opinions."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def make_bert(labels: Iterable[str] = TOPICS) -> BertForSequenceClassification:
    """Two layers of width 32 that tell topics apart."""
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return BertForSequenceClassification(config).eval()


def save_teacher(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """Write a teacher as transformers does."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def make_rows(count: int, longest: int = 40) -> list[dict[str, Any]]:
    """Rows of growing, then shrinking length, no two alike."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        length = 3 + (number * 7) % (longest - 2)
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        text = " ".join(WORDS[pick] for pick in picks)
        topic = TOPICS[number % len(TOPICS)]
        rows.append({"id": f"row {number}", "text": text, "label": topic, "language": "en"})
    return rows


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_config(root: Path, folder: Path, data: Path, **changes: Any) -> CacheConfig:
    """A cache of a language model in root/cache: 8 kept, 3 drawn, lossless."""
    settings: dict[str, Any] = {
        "output": root / "cache",
        "task": {"name": "causal-lm", "block_size": 32},
        "data": {"source": str(data), "columns": {}, "carry": ["language"]},
        "teacher": {"model": str(folder)},
        "targets": {"top_k": 8, "tail_draws": 3, "temperatures": [1.0, 2.0], "codec": "lossless"},
        "batch": {"tokens": 128},
        "shard": {"examples": 6},
    }
    return CacheConfig.model_validate(settings | changes)


def read_files(cache: Path) -> dict[str, bytes]:
    """The content of every file that must not depend on how a capture went."""
    names = ("manifest.json", "shards/**/*", "index/*", "tokenizer/*")
    files = [file for name in names for file in cache.glob(name) if file.is_file()]
    return {file.relative_to(cache).as_posix(): file.read_bytes() for file in files}
