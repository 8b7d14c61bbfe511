"""A student that is no transformer: it saves, opens, trains and reads any script like any other."""

import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.sources import DataConfig, load_rows
from pipeline.student.bag import HashedBagConfig, HashedBagForSequenceClassification
from pipeline.student.ngrams import HashedNgramTokenizer, hash_ngrams

SENTENCES = ["The sea is calm.", "海很平静。", "ባሕሩ ጸጥ ብሏል።", "Òkun náà dákẹ́ rọ́rọ́.", "समुद्र शान्त छ।"]


def small_bag(**settings: object) -> HashedBagForSequenceClassification:
    torch.manual_seed(0)
    config = HashedBagConfig(vocab_size=257, hidden_size=8, num_labels=3, **settings)
    return HashedBagForSequenceClassification(config).eval()


def small_tokenizer() -> HashedNgramTokenizer:
    return HashedNgramTokenizer(buckets=256, ngram_sizes=[1, 2, 3])


def fnv1a(ngram: str) -> int:
    """The definition, one code point at a time."""
    value = 0xCBF29CE484222325
    for point in map(ord, ngram):
        value = (value ^ point) * 0x100000001B3 % 2**64
    return value ^ (value >> 32)


def test_ngrams_are_the_windows_of_the_spaced_text_by_where_they_end() -> None:
    windows = ["a", " a", "b", "ab", " ab", "b ", "ab "]
    expected = [fnv1a(window) % 1000 + 1 for window in windows]
    assert hash_ngrams("  AB\n", [1, 2, 3], 1000).tolist() == expected


def test_hashes_are_pinned_for_ever() -> None:
    """A saved student is worthless when these numbers move."""
    pinned = [
        9114,
        7953,
        10429,
        3304,
        13187,
        9947,
        15946,
        8558,
        7017,
        16155,
        160,
        4179,
        8587,
        10102,
    ]
    assert hash_ngrams("Ruß 海", [1, 2, 4], 2**14).tolist() == pinned


@given(text=st.text(max_size=40))
def test_any_text_gives_ids_of_the_embedding(text: str) -> None:
    ids = hash_ngrams(text, [1, 2, 3, 4], 64)
    assert len(ids) >= 1
    assert ids.min() >= 1
    assert ids.max() <= 64


@given(text=st.text(st.characters(categories=["L", "M", "Zs"]), max_size=30))
def test_composition_and_white_space_do_not_matter(text: str) -> None:
    ids = hash_ngrams(text, [1, 2, 3], 4096)
    assert np.array_equal(ids, hash_ngrams(unicodedata.normalize("NFD", text), [1, 2, 3], 4096))
    assert np.array_equal(ids, hash_ngrams(f"\t{text}  \n", [1, 2, 3], 4096))


def test_scripts_without_spaces_share_ngrams_inside_a_sentence() -> None:
    whole = set(hash_ngrams("今天海很平静", [2], 2**20).tolist())
    part = set(hash_ngrams("海很平静", [2], 2**20).tolist())
    assert len(part & whole) == 4  # 海很 很平 平静 and the end


def test_tokens_are_names_that_map_back_to_ids() -> None:
    tokenizer = small_tokenizer()
    for sentence in SENTENCES:
        ids = tokenizer(sentence)["input_ids"]
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(sentence)) == ids
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == 257
    assert sorted(vocabulary.values()) == list(range(257))
    assert tokenizer.pad_token_id == 0


def test_truncation_cuts_the_end_of_the_text() -> None:
    tokenizer = small_tokenizer()
    whole = tokenizer("The sea is calm.")["input_ids"]
    assert tokenizer("The sea is calm.", truncation=True, max_length=9)["input_ids"] == whole[:9]


def test_a_pair_is_one_text_after_the_other() -> None:
    tokenizer = small_tokenizer()
    first, second = (tokenizer(text)["input_ids"] for text in SENTENCES[:2])
    assert tokenizer(*SENTENCES[:2])["input_ids"] == first + second
    batch = tokenizer(SENTENCES[:2], SENTENCES[1::-1])["input_ids"]
    assert batch == [first + second, second + first]


def test_logits_do_not_depend_on_padding() -> None:
    tokenizer, model = small_tokenizer(), small_bag(num_hidden_layers=1)
    together = model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits
    for row, sentence in enumerate(SENTENCES):
        alone = model(**tokenizer(sentence, return_tensors="pt")).logits
        torch.testing.assert_close(alone[0], together[row])


def test_the_mask_hides_ids_that_are_no_padding() -> None:
    model = small_bag()
    ids = torch.tensor([[5, 6, 7]])
    masked = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]])).logits
    torch.testing.assert_close(masked, model(input_ids=ids[:, :2]).logits)


def test_the_classes_are_read_from_the_mean_of_the_last_hidden_states() -> None:
    tokenizer, model = small_tokenizer(), small_bag()
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    output = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"][..., None].float()
    pooled = (output.hidden_states[-1] * mask).sum(dim=1) / mask.sum(dim=1)
    torch.testing.assert_close(model.classifier(pooled), output.logits)
    assert model(**inputs).hidden_states is None


def test_a_fresh_process_opens_a_saved_student(tmp_path: Path) -> None:
    tokenizer, model = small_tokenizer(), small_bag(num_hidden_layers=1)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    program = (
        "import pipeline.student.bag\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        f"t, m = T.from_pretrained({str(tmp_path)!r}), M.from_pretrained({str(tmp_path)!r})\n"
        f"print(m.eval()(**t({SENTENCES!r}, padding=True, return_tensors='pt')).logits.tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits.tolist()
    assert eval(printed.stdout) == expected


def test_the_auto_classes_know_the_bag(tmp_path: Path) -> None:
    config = AutoConfig.for_model("hashed-bag", num_labels=7)
    model = AutoModelForSequenceClassification.from_config(config)
    assert isinstance(model, HashedBagForSequenceClassification)
    assert sum(p.numel() for p in model.parameters()) == (2**16 + 1) * 24 + 24 * 7 + 7
    small_tokenizer().save_pretrained(tmp_path)
    small_bag().save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(opened, HashedNgramTokenizer)
    assert (opened.buckets, opened.ngram_sizes) == (256, [1, 2, 3])


def test_padding_never_learns() -> None:
    tokenizer, model = small_tokenizer(), small_bag().train()
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model(**inputs, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    gradient = model.embeddings.weight.grad
    assert gradient is not None
    assert gradient[0].abs().max() == 0
    assert gradient.abs().max() > 0


def test_token_dropout_leaves_the_mean_unbiased_and_is_off_in_evaluation() -> None:
    model = small_bag(token_dropout=0.5)
    ids = torch.arange(1, 257).reshape(1, -1)
    expected = model(input_ids=ids).logits
    assert torch.equal(expected, model(input_ids=ids).logits)
    model.train()
    sampled = torch.cat([model(input_ids=ids).logits for _ in range(400)])
    assert sampled.std(dim=0).min() > 0
    error = sampled.std(dim=0) / 400**0.5
    assert ((sampled.mean(dim=0) - expected[0]).abs() < 5 * error).all()


def test_a_bag_learns_a_topic_from_its_words() -> None:
    topics = [("rain snow wind", 0), ("goal match team", 1), ("bread salt soup", 2)] * 4
    tokenizer, model = small_tokenizer(), small_bag().train()
    inputs = tokenizer([text for text, _ in topics], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in topics])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _step in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    unseen = tokenizer(["snow and rain", "a team", "salt bread"], padding=True, return_tensors="pt")
    assert model.eval()(**unseen).logits.argmax(dim=1).tolist() == [0, 1, 2]


@pytest.mark.skipif(not os.environ.get("STILLROOM_SIB200"), reason="STILLROOM_SIB200 is not set")
def test_twenty_four_languages_are_tokenized_in_seconds() -> None:
    splits = {"train": "train", "validation": "validation", "test": "test"}
    texts = [row["text"] for row in load_rows(DataConfig(source="sib200", splits=splits), False)]
    tokenizer = HashedNgramTokenizer()
    began = time.process_time()
    encoded = tokenizer(texts, truncation=True)["input_ids"]
    assert time.process_time() - began < 10
    assert len(encoded) == 24 * 1004
