"""Questions about contexts of made-up words, and readers with random weights."""

from pathlib import Path
from typing import Any

import torch
from small_teachers import WORDS, make_tokenizer, save_teacher, write_rows
from small_words import make_bert_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForQuestionAnswering, PreTrainedTokenizerFast

from stages.cache_teacher import CacheConfig, cache_teacher

TASK = {"name": "question-answering", "max_length": 96, "stride": 8}


def make_questions(count: int, longest: int = 12) -> list[dict[str, Any]]:
    """Contexts of 4 to `longest` words; the answer is two of them, every fourth has none."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for number in range(count):
        length = 4 + (number * 5) % (longest - 3)
        words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)]
        place = number % (length - 1)
        start = len(" ".join(words[:place])) + (place > 0)
        answers = {"text": [" ".join(words[place : place + 2])], "answer_start": [start]}
        if number % 4 == 3:
            answers = {"text": [], "answer_start": []}
        rows.append(
            {
                "id": f"q{number}",
                "question": f"what holds {words[-1]}?",
                "context": " ".join(words),
                "answers": answers,
                "language": ("en", "de")[number % 2],
            }
        )
    return rows


def make_pair_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """The teachers' byte-level BPE, with marks around a question and its context, and types."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    marks = {"sep_token": "</s>", "cls_token": "<s>", "model_input_names": names}
    tokenizer = make_tokenizer(model_max_length=96, **marks, **options)
    first, last = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", first), ("</s>", last)],
    )
    return tokenizer


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, so that several of the teacher's tokens fall on one."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*WORDS, "what", "?"})]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def make_reader(vocab_size: int = 300, **changes: Any) -> BertForQuestionAnswering:
    """A reader with random weights, always the same."""
    torch.manual_seed(0)
    return BertForQuestionAnswering(make_bert_config(vocab_size, **changes)).eval()


def make_question_cache(root: Path, **changes: Any) -> Path:
    """A reader's cache with every position and the last layer."""
    save_teacher(root / "teacher", make_reader(), make_pair_tokenizer())
    rows = make_questions(30)
    files = {
        "train": str(write_rows(root / "train.jsonl", rows[:20])),
        "test": str(write_rows(root / "test.jsonl", rows[20:])),
    }
    settings: dict[str, Any] = {
        "output": str(root / "cache"),
        "task": TASK,
        "data": {
            "source": "json",
            "files": files,
            "splits": {"train": "train", "test": "test"},
            "carry": ["language"],
        },
        "teacher": {"model": str(root / "teacher")},
        "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
        "hidden": {"layers": [-1], "dtype": "float32"},
        "shard": {"examples": 16},
    }
    return cache_teacher(CacheConfig.model_validate(settings | changes), progress=False)
