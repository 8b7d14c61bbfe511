"""Students of every origin, and the checkpoints that are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_teachers import make_bert, make_llama, make_tokenizer, save_teacher
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from pipeline.config import StrictModel, parse_config
from pipeline.errors import ConfigError, ModelError
from pipeline.examples import Example
from pipeline.student import Origin, build_student, load_model, own_tokenizer
from pipeline.student.key_values import without_cache
from pipeline.tasks.causal_lm import CausalLM
from pipeline.tasks.sequence_classification import SequenceClassification

LANGUAGE = CausalLM(block_size=32)
TOPICS = SequenceClassification(labels=["science", "sports", "travel"])
SMALL = {"layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 24}


class Holder(StrictModel):
    student: Origin


def origin(**settings: Any) -> Any:
    return parse_config(Holder, {"student": settings}, "test").student


def build(task: Any = LANGUAGE, seed: int = 0, **settings: Any) -> PreTrainedModel:
    classes = 300 if task is LANGUAGE else 3
    return build_student(origin(**settings), task, classes, make_tokenizer(), seed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("llama"), make_llama())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("bert"), make_bert())


def small_bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_few_numbers_make_a_language_model(architecture: str) -> None:
    student = build(**{"from": "scratch", "architecture": architecture, **SMALL})
    assert student.config.model_type == architecture
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    assert student.config.vocab_size == 300
    assert student.dtype == torch.float32


def test_the_seed_decides_the_weights() -> None:
    settings = {"from": "scratch", "architecture": "llama", **SMALL}
    one, same, other = (build(seed=seed, **settings).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("architecture", "rates"),
    [
        ("gpt2", ["attn_pdrop", "embd_pdrop", "resid_pdrop"]),
        ("bert", ["attention_probs_dropout_prob", "hidden_dropout_prob"]),
    ],
)
def test_dropout_sets_every_rate(architecture: str, rates: list[str]) -> None:
    task = LANGUAGE if architecture == "gpt2" else TOPICS
    settings = {"from": "scratch", "architecture": architecture, "dropout": 0.4, **SMALL}
    student = build(task, **settings)
    assert [getattr(student.config, name) for name in rates] == [0.4] * len(rates)
    found = {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.4}


def test_dropout_leaves_switches_alone() -> None:
    settings = {"from": "scratch", "architecture": "esm", "dropout": 0.4, **SMALL}
    config = build(TOPICS, **settings).config
    assert config.hidden_dropout_prob == 0.4
    assert config.token_dropout is False  # a switch, not a rate


def test_a_checkpoint_goes_on_learning_with_its_weights(llama: Path) -> None:
    student = build(**{"from": "pretrained", "model": str(llama)})
    own = make_llama().state_dict()
    assert all(torch.equal(own[name], value) for name, value in student.state_dict().items())
    assert own_tokenizer(origin(**{"from": "pretrained", "model": str(llama)})) is not None


def test_a_pruned_teacher_has_the_chosen_layers_and_opens_again(tmp_path: Path) -> None:
    teacher = make_llama(num_hidden_layers=4)
    folder = save_teacher(tmp_path / "teacher", teacher)
    student = build(**{"from": "teacher", "model": str(folder), "layers": [0, 3]}).eval()
    weights, own = student.state_dict(), teacher.state_dict()
    for name, value in weights.items():
        at = name.replace("layers.1.", "layers.3.")
        assert torch.equal(value, own[at]), name
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, again(input_ids=ids).logits)
        start = student.generate(ids, max_new_tokens=3, do_sample=False)  # uses layer numbers
    assert start.shape[1] <= 12


def test_keeping_every_layer_is_the_teacher_itself(llama: Path) -> None:
    student = build(**{"from": "teacher", "model": str(llama), "layers": [0, 1]}).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, make_llama()(input_ids=ids).logits)


def test_an_encoder_becomes_a_classifier_with_a_new_head(tmp_path: Path, bert: Path) -> None:
    base = BertModel(small_bert_config())
    base.save_pretrained(tmp_path / "base")
    student = load_model(str(tmp_path / "base"), TOPICS, 3)
    own = base.state_dict()
    assert torch.equal(
        student.state_dict()["bert.encoder.layer.1.output.dense.weight"],
        own["encoder.layer.1.output.dense.weight"],
    )
    assert load_model(str(bert), TOPICS, 3).config.num_labels == 3
    more = SequenceClassification(labels=list("abcdefg"))
    assert load_model(str(bert), more, 7).classifier.out_features == 7  # another head is new


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint of BertLMHeadModel, it lacks cls\..* and"):
        load_model(str(bert), LANGUAGE, 300)
    folder = tmp_path / "half"  # a folder whose config promises more than its weights hold
    make_llama(num_hidden_layers=1).save_pretrained(folder)
    make_llama(num_hidden_layers=2).config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"it lacks model.layers.1.* and 8 more; choose one"):
        load_model(str(folder), LANGUAGE, 300)
    BertModel(small_bert_config()).save_pretrained(tmp_path / "thin")
    config = small_bert_config()
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "thin")
    with pytest.raises(ModelError, match=r"it lacks bert.encoder.layer.2"):
        load_model(str(tmp_path / "thin"), TOPICS, 3)


def test_a_model_that_looks_ahead_is_no_language_model(tmp_path: Path) -> None:
    BertForMaskedLM(small_bert_config()).save_pretrained(tmp_path / "masked")
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens it should predict"):
        load_model(str(tmp_path / "masked"), LANGUAGE, 300)
    with pytest.raises(ModelError, match="bert: BertLMHeadModel sees the tokens"):
        build(**{"from": "scratch", "architecture": "bert", **SMALL})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"from": "scrach"}, r"student.from 'scrach' is not known; did you mean 'scratch'"),
        ({"from": "scratch", "architecture": "lama"}, r"'lama' is not known; did you mean 'llama'"),
        ({"from": "scratch", "architecture": "vit"}, "'vit': no AutoModelForCausalLM"),
        ({"from": "scratch", "architecture": "bloom", **SMALL}, "bloom: documents packed into one"),
        (
            {"from": "scratch", "architecture": "llama", "layer": 2},
            "unknown key 'student.layer'; did you mean 'layers'",
        ),
        ({"from": "pretrained", "model": "/nowhere/model"}, "/nowhere/model: cannot be opened"),
        (
            {"from": "teacher", "model": "{llama}", "layers": [0, 2]},
            "has no layer 2; it has 0 to 1",
        ),
    ],
)
def test_a_student_that_cannot_be_made_says_why(
    llama: Path, settings: dict[str, Any], message: str
) -> None:
    settings = {k: str(llama) if v == "{llama}" else v for k, v in settings.items()}
    with pytest.raises((ConfigError, ModelError), match=message) as refused:
        build(**settings)
    assert "\n" not in str(refused.value)


def test_a_model_that_does_not_isolate_may_read_unpacked_documents() -> None:
    settings = {"from": "scratch", "architecture": "bloom", **SMALL}
    unpacked = CausalLM(block_size=32, packing=False)
    assert build_student(origin(**settings), unpacked, 300, make_tokenizer(), 0).config.vocab_size


def test_a_head_smaller_than_the_class_space_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="has 304 classes, the cache has 1,000; choose"):
        load_model(str(llama), LANGUAGE, 1000)


def packed(change: int) -> Example:
    """Documents of 5, 6 and 4 tokens in a row; `change` moves a token of the first."""
    ids = (np.arange(15, dtype=np.int32) * 7) % 37
    ids[2] += change
    lengths = np.array([5, 6, 4], dtype=np.int32)
    return Example("packed", ids, lengths, np.arange(14, dtype=np.int32), ids[1:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_document_of_a_packed_row_sees_another(architecture: str, attention: str) -> None:
    torch.manual_seed(0)
    if architecture == "llama":
        model: Any = make_llama(attn_implementation=attention)
    else:
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        config = GPT2Config(**sizes, initializer_range=0.3, attn_implementation=attention)
        model = GPT2LMHeadModel(config).eval()
    short = Example(
        "short",
        *(getattr(packed(0), f)[:2] for f in ("input_ids",)),
        np.array([2], dtype=np.int32),
        np.array([0], dtype=np.int32),
        np.array([7], dtype=np.int32),
    )
    answers = []
    with torch.no_grad(), without_cache(model):
        for change in (0, 1):
            batch = LANGUAGE.batch([packed(change), short], 0)  # padded beside another row
            answers.append(model(**batch.inputs).logits)
        ids = torch.from_numpy(packed(0).input_ids).long()
        alone = model(input_ids=ids[None, 5:11]).logits[0]
    moved = (answers[0] - answers[1]).abs().amax(dim=2)
    assert not moved[0, :2].any()  # nothing before the change,
    assert (moved[0, 2:5] > 0).all()  # its own document after it,
    assert not moved[0, 5:].any()  # no other document
    assert not moved[1].any()  # and no other row
    torch.testing.assert_close(answers[0][0, 5:11], alone, rtol=1e-4, atol=1e-5)


def test_classifiers_open_with_their_auto_class(tmp_path: Path) -> None:
    settings = {"from": "scratch", "architecture": "hashed-bag", "hidden_size": 8}
    student_origin = origin(**settings, tokenizer={"buckets": 64})
    tokenizer = own_tokenizer(student_origin)
    student = build_student(student_origin, TOPICS, 3, tokenizer, 0)
    assert student.config.vocab_size == 65
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    with pytest.raises(ConfigError, match="llama reads the cache's tokens; leave it out"):
        own_tokenizer(origin(**{"from": "scratch", "architecture": "llama", "tokenizer": {"x": 1}}))
