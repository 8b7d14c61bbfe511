"""A made-up SIB-200 in its local layout: one meaning, spelled by 24 languages that share no word.

sentence number -> topic, words -> spelled per language -> <folder>/sib200_core24.jsonl.gz

Each language lists the sentences in an order of its own, so that only ids can join them.
"""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from pipeline.sources.sib200 import LANGUAGES

_FILE = "sib200_core24.jsonl.gz"
TOPICS = ("geography", "health", "sports", "travel")
SPLITS = {"train": 80, "dev": 8, "test": 40}
_FIRST_LETTERS = {
    "Latn": 0x61,
    "Cyrl": 0x430,
    "Hans": 0x4E00,
    "Arab": 0x627,
    "Deva": 0x915,
    "Ethi": 0x1200,
}
_TOPIC_WORDS, _OTHER_WORDS = 6, 12


def write_languages(folder: Path) -> Path:
    """Write the data set and return its folder."""
    sentences = _make_sentences()
    folder.mkdir(parents=True)
    with gzip.open(folder / _FILE, "wt", encoding="utf-8") as file:
        for language in LANGUAGES:
            random.Random(language).shuffle(sentences)
            for number, split, topic, words in sentences:
                text = " ".join(spell(word, language) for word in words)
                row = {"lang": language, "id": number, "split": split, "label": topic, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder


def read_languages(folder: Path) -> list[dict[str, Any]]:
    """The rows of the data set, as they were written."""
    with gzip.open(folder / _FILE, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_encoder(folder: Path) -> Path:
    """Write a small untrained BERT that knows the English words."""
    words = [spell(word, "eng_Latn") for word in _vocabulary()]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spell(word: str, language: str) -> str:
    """The word of a language for a meaning, in the language's script."""
    letters = hashlib.blake2b(f"{language} {word}".encode(), digest_size=7).digest()
    first = _FIRST_LETTERS[language.split("_")[1]]
    return "".join(chr(first + letter % 26) for letter in letters)


def _vocabulary() -> list[str]:
    return [f"{topic} {i}" for topic in TOPICS for i in range(_TOPIC_WORDS)] + [
        f"other {i}" for i in range(_OTHER_WORDS)
    ]


def _make_sentences() -> list[tuple[int, str, str, list[str]]]:
    """Numbers that are no positions, splits, topics, and the meanings of six words."""
    chance = random.Random(0)
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    numbers = chance.sample(range(2000), len(splits))
    sentences = []
    for place, (number, split) in enumerate(zip(numbers, splits, strict=True)):
        topic = TOPICS[place % len(TOPICS)]
        words = [f"{topic} {chance.randrange(_TOPIC_WORDS)}" for _ in range(3)]
        words += [f"other {chance.randrange(_OTHER_WORDS)}" for _ in range(3)]
        chance.shuffle(words)
        sentences.append((number, split, topic, words))
    return sentences
