"""Tagged words, a tagger with random weights, and a student that spells its words in bytes."""

from pathlib import Path
from typing import Any

import torch
from small_teachers import WORDS, make_tokenizer, save_teacher, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stages.cache_teacher import CacheConfig, cache_teacher

TAGS = ["B-LOC", "B-PER", "I-PER", "O"]


def tag_word(word: str) -> str:
    """The tag that a word always has."""
    return TAGS[sum(word.encode()) % len(TAGS)]


def make_sentences(count: int) -> list[dict[str, Any]]:
    """Sentences in two languages, every fifth of them without tags."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        length = 2 + (number * 5) % 9
        words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)]
        tags = None if number % 5 == 4 else [tag_word(word) for word in words]
        language = ("en", "sv")[number % 2]
        rows.append({"id": f"s{number}", "tokens": words, "tags": tags, "language": language})
    return rows


def make_byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token per byte, between [CLS] and [SEP], which the other tokenizer has not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    marks = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**marks, **options})


def make_bert_config(vocab_size: int, **changes: Any) -> BertConfig:
    """Two layers of width 32, sharp enough to have opinions."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    return BertConfig(**(sizes | changes))


def make_tagger(vocab_size: int = 300, **changes: Any) -> BertForTokenClassification:
    """A tagger with random weights, always the same."""
    torch.manual_seed(0)
    names = dict(enumerate(TAGS))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    return BertForTokenClassification(make_bert_config(vocab_size, **labels, **changes)).eval()


def save_byte_student(folder: Path, model: PreTrainedModel) -> Path:
    """A checkpoint that brings the tokenizer of bytes."""
    return save_teacher(folder, model, make_byte_tokenizer(model_max_length=128))


def make_tag_cache(root: Path, **changes: Any) -> Path:
    """A tagger's cache with every class and the last layer, the words carried along."""
    save_teacher(root / "teacher", make_tagger(), make_tokenizer(model_max_length=128))
    rows = make_sentences(30)
    files = {
        "train": str(write_rows(root / "train.jsonl", rows[:20])),
        "test": str(write_rows(root / "test.jsonl", rows[20:])),
    }
    settings: dict[str, Any] = {
        "output": str(root / "cache"),
        "task": {"name": "token-classification"},
        "data": {
            "source": "json",
            "files": files,
            "splits": {"train": "train", "test": "test"},
            "carry": ["tokens", "language"],
        },
        "teacher": {"model": str(root / "teacher")},
        "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
        "hidden": {"layers": [-1], "dtype": "float32"},
        "shard": {"examples": 16},
    }
    return cache_teacher(CacheConfig.model_validate(settings | changes), progress=False)
