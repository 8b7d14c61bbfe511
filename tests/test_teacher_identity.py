"""Digests follow content: they change with it, and with nothing else."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CTRLTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.examples import Example
from pipeline.identity import (
    ExamplesDigest,
    digest_json,
    digest_tokenizer,
    digest_tokenizer_parts,
    digest_weights,
)
from pipeline.student import HashedNgramTokenizer

TEXTS = ["the still room holds many bottles", "a teacher runs once", "students read the shelf"]


def make_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=make_backend(), bos_token="<s>", eos_token="</s>", **options
    )


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def make_example(**changes: Any) -> Example:
    example = Example(
        example_id="a",
        input_ids=np.array([1, 2, 3], dtype=np.int32),
        segment_lengths=np.array([3], dtype=np.int32),
        target_positions=np.array([0, 1], dtype=np.int32),
        label_ids=np.array([2, 3], dtype=np.int32),
        columns={"language": "en"},
    )
    return replace(example, **changes)


def digest_examples(*examples: Example) -> str:
    digest = ExamplesDigest()
    for example in examples:
        digest.add(example)
    return digest.hexdigest()


def test_a_tokenizer_read_back_from_disk_has_the_same_digest(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{{ messages }}")
    tokenizer.save_pretrained(tmp_path / "one")
    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "renamed")
    thrice = AutoTokenizer.from_pretrained(tmp_path / "renamed")
    digests = {
        digest_tokenizer(t)
        for t in (tokenizer, make_tokenizer(chat_template="{{ messages }}"), again, thrice)
    }
    assert len(digests) == 1


def test_truncation_padding_and_use_do_not_change_a_tokenizers_digest() -> None:
    tokenizer = make_tokenizer(pad_token="</s>")
    before = digest_tokenizer(tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert digest_tokenizer(tokenizer) == before


def test_one_vocabulary_entry_changes_a_tokenizers_digest() -> None:
    text = make_backend().to_str()
    assert '"teacher"' in text or '"the"' in text
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace('"<s>"', '"<t>"')),
        bos_token="<t>",
        eos_token="</s>",
    )
    assert digest_tokenizer(changed) != digest_tokenizer(make_tokenizer())


@pytest.mark.parametrize(
    "options", [{"chat_template": "{{ messages[0] }}"}, {"additional_special_tokens": ["<x>"]}]
)
def test_template_and_added_tokens_change_a_tokenizers_digest(options: dict[str, Any]) -> None:
    assert digest_tokenizer(make_tokenizer(**options)) != digest_tokenizer(make_tokenizer())


def test_the_order_of_merges_changes_a_tokenizers_digest() -> None:
    backend = make_backend()
    first = digest_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    content = json.loads(backend.to_str())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    assert digest_tokenizer(swapped) != first


def make_python_tokenizer(folder: Path, **options: Any) -> CTRLTokenizer:
    """A tokenizer whose merges are no part of its vocabulary's file."""
    folder.mkdir()
    names = ["a</w>", "b</w>", "a@@", "b@@", "ab</w>", "<unk>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = options.pop("merges", "a b</w>\nb a</w>\n")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    return CTRLTokenizer(*files, **options)


def test_a_tokenizer_in_python_is_known_by_its_merges_and_settings_too(tmp_path: Path) -> None:
    first = make_python_tokenizer(tmp_path / "first")
    assert not first.is_fast
    merged = make_python_tokenizer(tmp_path / "merged", merges="b a</w>\na b</w>\n")
    settled = make_python_tokenizer(tmp_path / "settled", do_lower_case=True)
    assert first.get_vocab() == merged.get_vocab() == settled.get_vocab()
    assert len({digest_tokenizer(t) for t in (first, merged, settled)}) == 3
    parts = [digest_tokenizer_parts(t) for t in (first, merged)]
    assert {name for name in parts[0] if parts[0][name] != parts[1][name]} == {"merges.txt"}


def test_a_tokenizer_in_python_read_back_from_disk_has_the_same_digest(tmp_path: Path) -> None:
    for name, tokenizer in {
        "ctrl": make_python_tokenizer(tmp_path / "made", model_max_length=32),
        "byt5": ByT5Tokenizer(extra_ids=3),
        "ngrams": HashedNgramTokenizer(buckets=64),
    }.items():
        tokenizer.save_pretrained(tmp_path / name)
        again = type(tokenizer).from_pretrained(tmp_path / name)
        again.truncation_side = "left"
        assert digest_tokenizer(again) == digest_tokenizer(tokenizer)


def test_weights_read_back_from_disk_have_the_same_digest(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    assert digest_weights(LlamaForCausalLM.from_pretrained(tmp_path)) == digest_weights(model)


def test_one_weight_its_dtype_or_its_shape_changes_the_digest() -> None:
    model = make_model()
    before = digest_weights(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    changed = digest_weights(model)
    halved = digest_weights(make_model().to(torch.bfloat16))
    layer = torch.nn.Linear(2, 6, bias=False)
    reshaped = torch.nn.Linear(6, 2, bias=False)
    reshaped.weight = torch.nn.Parameter(layer.weight.detach().view(2, 6))
    assert len({before, changed, halved}) == 3
    assert digest_weights(layer) != digest_weights(reshaped)


@pytest.mark.parametrize(
    "changes",
    [
        {"example_id": "b"},
        {"input_ids": np.array([1, 2, 4], dtype=np.int32)},
        {"segment_lengths": np.array([1, 2], dtype=np.int32)},
        {"target_positions": np.array([0, 2], dtype=np.int32)},
        {"label_ids": np.array([2, -100], dtype=np.int32)},
        {"columns": {"language": "de"}},
    ],
)
def test_any_part_of_an_example_changes_the_digest(changes: dict[str, Any]) -> None:
    assert digest_examples(make_example(**changes)) != digest_examples(make_example())


def test_examples_are_digested_in_their_order() -> None:
    first, second = make_example(), make_example(example_id="b")
    assert digest_examples(first, second) != digest_examples(second, first)


def test_keys_are_digested_without_an_order() -> None:
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})


def test_another_process_agrees(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    script = (
        "import sys; from transformers import AutoTokenizer, AutoModelForCausalLM as M\n"
        "from pipeline.identity import digest_tokenizer, digest_weights\n"
        "f = sys.argv[1]\n"
        "print(digest_tokenizer(AutoTokenizer.from_pretrained(f)),"
        " digest_weights(M.from_pretrained(f)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    root = Path(__file__).parents[1]
    other = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, check=True, text=True
    ).stdout
    assert other == f"{digest_tokenizer(make_tokenizer())} {digest_weights(make_model())}\n"
