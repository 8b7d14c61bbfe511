"""Masked language modelling: what is hidden, and that teacher and student see the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import TINY, make_data, make_student_config, read_lines
from small_teachers import make_bert, make_tokenizer, save_teacher
from tokenizers import processors
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from pipeline.batches import Collator, Selection
from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import score_model, teacher_scores
from pipeline.examples import Example
from pipeline.runs import read_result
from pipeline.tasks.masked_lm import MaskedLM
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.train_student import train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher

MASK, BOS, EOS = 300, 0, 1
TEXT = "the still room holds many bottles and one teacher speaks once to all the students"


def make_masking_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, every text framed, and a mask token with the id 300."""
    tokenizer = make_tokenizer(mask_token="<mask>", model_max_length=64, **options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_masking_tokenizer()


def examples(texts: Sequence[str], tokenizer: Any, **options: Any) -> list[Example]:
    rows = [{"id": f"row {i}", "split": "train", "text": text} for i, text in enumerate(texts)]
    return list(MaskedLM(**options).examples(rows, tokenizer, []))


def unmask(example: Example) -> np.ndarray:
    """The tokens of an example before any was hidden."""
    ids = example.input_ids.copy()
    ids[example.target_positions] = example.label_ids
    return ids


def test_labels_are_what_the_text_says_where_it_is_hidden(tokenizer: Any) -> None:
    (example,) = examples([TEXT], tokenizer, random=0.0, keep=0.0)
    whole = tokenizer(TEXT)["input_ids"]
    assert unmask(example).tolist() == whole
    assert (example.input_ids[example.target_positions] == MASK).all()
    assert len(example.target_positions) == round(0.15 * (len(whole) - 2))
    assert example.example_id == "row 0@0#0"


@given(
    probability=st.floats(0.01, 1.0),
    whole_words=st.booleans(),
    seed=st.integers(0, 2**32),
    text=st.text("abc de", min_size=1, max_size=80).filter(str.strip),
)
@settings(deadline=None)
def test_every_masking_hides_a_target_and_never_a_special_token(
    probability: float, whole_words: bool, seed: int, text: str
) -> None:
    found = examples(
        [text],
        make_masking_tokenizer(),
        probability=probability,
        whole_words=whole_words,
        seed=seed,
        maskings=2,
    )
    assert found
    for example in found:
        assert len(example.target_positions) >= 1
        assert (np.diff(example.target_positions) > 0).all()
        hidden = set(example.target_positions.tolist())
        assert hidden <= set(range(1, len(example.input_ids) - 1))
        visible = np.setdiff1d(np.arange(len(example.input_ids)), example.target_positions)
        assert (example.input_ids[visible] == unmask(example)[visible]).all()


def test_maskings_of_a_text_differ_and_are_the_same_from_run_to_run(tokenizer: Any) -> None:
    first, again = (examples([TEXT], tokenizer, maskings=3) for _ in range(2))
    assert [e.example_id for e in first] == ["row 0@0#0", "row 0@0#1", "row 0@0#2"]
    assert len({tuple(e.target_positions.tolist()) for e in first}) == 3
    for one, two in zip(first, again, strict=True):
        assert (one.input_ids == two.input_ids).all()
    (other,) = examples([TEXT], tokenizer, seed=1)
    assert other.target_positions.tolist() != first[0].target_positions.tolist()


def test_a_long_text_becomes_pieces_that_hold_all_of_it(tokenizer: Any) -> None:
    found = examples([TEXT], tokenizer, max_length=12)
    assert [e.example_id.split("#")[0] for e in found] == [f"row 0@{i}" for i in range(len(found))]
    body = [token for example in found for token in unmask(example)[1:-1].tolist()]
    assert body == tokenizer(TEXT)["input_ids"][1:-1]
    assert max(len(example.input_ids) for example in found) == 12


def test_whole_words_are_hidden_whole(tokenizer: Any) -> None:
    words = np.array([-1 if w is None else w for w in tokenizer(TEXT).word_ids()])
    for example in examples([TEXT], tokenizer, whole_words=True, maskings=8):
        hidden = set(words[example.target_positions].tolist())
        assert (
            example.target_positions.tolist()
            == np.flatnonzero(np.isin(words, list(hidden))).tolist()
        )


def test_shares_of_random_and_kept_tokens_are_those_asked_for(tokenizer: Any) -> None:
    found = examples([TEXT] * 4, tokenizer, probability=0.5, maskings=50, random=0.2, keep=0.3)
    shown = np.concatenate([e.input_ids[e.target_positions] for e in found])
    labels = np.concatenate([e.label_ids for e in found])
    assert abs((shown == MASK).mean() - 0.5) < 0.03
    assert abs((shown == labels).mean() - 0.3) < 0.03  # a random token is rarely the right one
    assert not np.isin(shown[shown != MASK], tokenizer.all_special_ids).any()


def test_a_tokenizer_that_cannot_mask_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no mask token; choose a model"):
        examples([TEXT], make_tokenizer())
    unlimited = make_tokenizer(mask_token="<mask>")
    with pytest.raises(ConfigError, match=r"task\.max_length: the tokenizer does not say"):
        examples([TEXT], unlimited)
    with pytest.raises(DataError, match="example 1: has None as its text"):
        list(MaskedLM().examples([{"id": 1, "text": None}], tokenizer, []))


def test_a_text_without_anything_to_hide_gives_no_example(tokenizer: Any) -> None:
    assert examples([""], tokenizer) == []


def make_masked_teacher(**changes: Any) -> BertForMaskedLM:
    """A BERT whose head has a transform and a bias of its own."""
    config = make_bert().config
    config.update({"vocab_size": 301, **changes})
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masked")
    save_teacher(root / "teacher", make_masked_teacher(), make_masking_tokenizer())
    config = {
        "output": str(root / "cache"),
        "task": {"name": "masked-lm", "max_length": 48, "maskings": 2},
        "data": make_data(root),
        "teacher": {"model": str(root / "teacher")},
        "targets": {"top_k": "all", "codec": "lossless"},
        "hidden": {"layers": [-1], "dtype": "float32"},
        "batch": {"tokens": 256, "workers": 2},
    }
    return cache_teacher(CacheConfig.model_validate(config), progress=False)


def test_the_cache_holds_what_the_whole_model_says(cache: Path) -> None:
    model = make_masked_teacher()
    opened = TeacherCache.open(cache)
    for row in (0, 7):
        example = opened[row]
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.inference_mode():
            own = model(input_ids=ids, output_hidden_states=True)
        picked = torch.from_numpy(example.target_positions).long()
        expected = own.logits[0, picked].log_softmax(-1)
        found = example.targets.at(1.0)
        torch.testing.assert_close(
            found.log_probs, expected.gather(1, found.ids), rtol=1e-4, atol=1e-4
        )
        states = own.hidden_states[-1][0]
        torch.testing.assert_close(example.hidden["layer.2"], states, rtol=1e-4, atol=1e-4)


def test_a_student_with_the_teachers_weights_agrees_with_its_cache(cache: Path) -> None:
    opened = TeacherCache.open(cache)
    task = MaskedLM(max_length=48, maskings=2)
    held_out = Selection(opened, opened.split_indices("test"))
    own = score_model(make_masked_teacher(), held_out, Collator(task, EOS), 4)
    assert np.allclose(own.kl_to_teacher, 0.0, atol=1e-4)
    assert (own.agreement == 1.0).all()
    found = {metric.name: metric.value for metric in task.metrics(own)}
    taught = {metric.name: metric.value for metric in task.metrics(teacher_scores(held_out))}
    for name in ("loss", "pseudo_perplexity", "accuracy"):
        assert found[name] == pytest.approx(taught[name], rel=1e-4)
    assert found["pseudo_perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_a_student_learns_to_fill_the_teachers_masks(cache: Path, tmp_path: Path) -> None:
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={
            "from": "scratch",
            "architecture": "bert",
            **TINY,
            "settings": {"max_position_embeddings": 64},
        },
        losses=[{"name": "forward_kl"}, {"name": "hidden_mse", "layers": {-1: -1}, "weight": 0.1}],
        training={"num_train_epochs": 8, "learning_rate": 1e-2},
        evaluation={"every": 6},
    )
    result = read_result(train_student(config))
    lines = read_lines(tmp_path / "run")
    curve = [line["kl_to_teacher"] for line in lines if line["split"] == "eval"]
    assert curve[-1] < 0.7 * curve[0]
    names = {metric.name for metric in result.metrics}
    assert {"pseudo_perplexity", "accuracy", "kl_to_teacher", "agreement"} <= names


def test_a_pruned_teacher_is_a_student_of_its_own_cache(cache: Path, tmp_path: Path) -> None:
    teacher = {"from": "teacher", "model": str(cache.parent / "teacher"), "layers": [0]}
    config = make_student_config(
        cache, tmp_path / "run", student=teacher, training={"max_steps": 2}
    )
    run = train_student(config)
    assert BertForMaskedLM.from_pretrained(run).config.num_hidden_layers == 1


def test_a_teacher_that_fills_masks_can_be_trained_from_scratch(tmp_path: Path) -> None:
    config = {
        "output": str(tmp_path / "teacher"),
        "task": {"name": "masked-lm", "max_length": 32},
        "data": make_data(tmp_path),
        "model": {
            "from": "scratch",
            "architecture": "bert",
            **TINY,
            "settings": {"max_position_embeddings": 32},
        },
        "tokenizer": {"vocab_size": 300},
        "training": {"max_steps": 2, "use_cpu": True},
    }
    folder = train_teacher(TrainTeacherConfig.model_validate(config))
    assert BertForMaskedLM.from_pretrained(folder).config.vocab_size == 300
