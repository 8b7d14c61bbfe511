"""How fast each part of a student learns: by depth, by pattern, and with its weight decay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_language_cache, make_student_config, open_student
from small_teachers import make_bert
from small_worlds import OnStep, make_example, make_student, make_trainer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from pipeline.errors import ConfigError, StillroomError
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.optimizing import LearningRates
from pipeline.student import build_student
from pipeline.student.bag import HashedBagConfig, HashedBagForSequenceClassification
from pipeline.student.parameters import levels_below_head
from pipeline.terms import attach_projections
from stages.train_student import read_cache, train_student


def small_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2))


def small_t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3, **sizes))


def small_bag() -> nn.Module:
    return HashedBagForSequenceClassification(HashedBagConfig(vocab_size=9, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            make_student,
            {
                "lm_head.weight": 0,
                "model.norm.weight": 0,
                "model.layers.1.mlp.up_proj.weight": 1,
                "model.layers.0.input_layernorm.weight": 2,
                "model.embed_tokens.weight": 3,
            },
        ),
        (lambda: make_student(tie_word_embeddings=True), {"model.embed_tokens.weight": 3}),
        (
            make_bert,
            {
                "classifier.bias": 0,
                "bert.pooler.dense.weight": 0,
                "bert.encoder.layer.1.output.dense.weight": 1,
                "bert.encoder.layer.0.output.LayerNorm.bias": 2,
                "bert.embeddings.LayerNorm.weight": 3,
                "bert.embeddings.word_embeddings.weight": 3,
            },
        ),
        (
            small_gpt2,
            {
                "transformer.ln_f.weight": 0,
                "transformer.h.2.ln_1.weight": 1,
                "transformer.h.0.attn.c_attn.weight": 3,
                "transformer.wte.weight": 4,
                "transformer.wpe.weight": 4,
            },
        ),
        (
            small_t5,
            {
                "decoder.final_layer_norm.weight": 0,
                "decoder.block.2.layer.0.SelfAttention.q.weight": 1,
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 3,
                "encoder.block.1.layer.0.SelfAttention.q.weight": 1,
                "shared.weight": 4,
            },
        ),
        (small_bag, {"classifier.weight": 0, "layers.0.weight": 1, "embeddings.weight": 2}),
    ],
    ids=["llama", "tied", "bert", "gpt2", "t5", "bag"],
)
def test_layers_are_found_by_name_from_the_head_down(make: Any, expected: dict[str, int]) -> None:
    model = make()
    levels = levels_below_head(model)
    assert levels.keys() == {name for name, _ in model.named_parameters()}
    assert {name: levels[name] for name in expected} == expected


def test_a_model_whose_layers_have_no_known_names_is_refused() -> None:
    model = make_student()
    model.model.floors = model.model.layers
    del model.model.layers
    with pytest.raises(StillroomError, match="LlamaForCausalLM: names no layer as") as refused:
        LearningRates(layer_decay=0.5).by_name(model, 1.0)
    assert "\n" not in str(refused.value)


def groups_by_name(trainer: Any) -> dict[str, tuple[float, float]]:
    """The learning rate and weight decay that the optimizer has for each parameter."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_every_parameter_has_the_stated_rate_and_decays_as_transformers_has_it(
    tmp_path: Path,
) -> None:
    losses = [ForwardKL(), HiddenMSE(layers={1: -1})]
    rates = LearningRates(
        layer_decay=0.5,
        projections=0.3,
        patterns={"*layers.0.mlp*": 0.7, "*mlp*": 0.6, "lm_head*": 0.0},
    )
    trainer = make_trainer(
        tmp_path,
        losses,
        [make_example(0)],
        learning_rates=rates,
        optim="adamw_torch",
        learning_rate=0.08,
        weight_decay=0.25,
    )
    found = groups_by_name(trainer)
    assert found.keys() == {name for name, _ in trainer.model.named_parameters()}
    expected = {
        "model.norm.weight": (0.08, 0.0),
        "lm_head.weight": (0.0, 0.25),
        "model.layers.1.self_attn.q_proj.weight": (0.04, 0.25),
        "model.layers.1.input_layernorm.weight": (0.04, 0.0),
        "model.layers.1.mlp.up_proj.weight": (0.6, 0.25),
        "model.layers.0.self_attn.q_proj.weight": (0.02, 0.25),
        "model.layers.0.mlp.up_proj.weight": (0.7, 0.25),
        "model.embed_tokens.weight": (0.01, 0.25),
    }
    projections = {name: value for name, value in found.items() if "projections" in name}
    assert sorted(projections.values()) == [(0.3, 0.0), (0.3, 0.25)]
    assert {name: found[name] for name in expected} == expected


def test_without_rates_of_their_own_the_groups_are_those_of_transformers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.1, "weight_decay": 0.2}
    plain = make_trainer(tmp_path, [ForwardKL()], [make_example(0)], **settings)
    other = make_trainer(
        tmp_path, [ForwardKL()], [make_example(0)], learning_rates=LearningRates(), **settings
    )
    assert groups_by_name(other) == groups_by_name(plain)


def test_a_schedule_scales_every_rate_alike(tmp_path: Path) -> None:
    found: list[list[float]] = []
    trainer = make_trainer(
        tmp_path,
        [ForwardKL()],
        [make_example(n) for n in range(4)],
        callbacks=[OnStep(lambda _: found.append([g["lr"] for g in groups()]))],
        learning_rates=LearningRates(layer_decay=0.5),
        learning_rate=0.1,
        lr_scheduler_type="linear",
        per_device_train_batch_size=1,
    )

    def groups() -> list[dict[str, Any]]:
        return list(trainer.optimizer.param_groups)

    trainer.train()
    for taken, rates in enumerate(found[:4], 1):
        left = 0.1 * (1 - taken / 12)  # three epochs of four steps
        assert sorted(rates) == pytest.approx([left / 8, left / 4, left / 2, left])


def test_a_rate_of_zero_leaves_weights_bit_equal(tmp_path: Path) -> None:
    cache = make_language_cache(tmp_path)
    config = make_student_config(
        cache, tmp_path / "run", learning_rates={"patterns": {"*embed_tokens*": 0.0}}
    )
    reading = read_cache(config)
    first = build_student(config.student, reading.task, 300, reading.tokenizer, config.seed)
    after = open_student(train_student(config)).state_dict()
    for name, before in first.state_dict().items():
        assert torch.equal(before, after[name]) == ("embed_tokens" in name), name


def test_what_cannot_be_grouped_is_refused_in_one_line(tmp_path: Path) -> None:
    model = make_student()
    attach_projections(model, [], {})
    wrong = LearningRates(patterns={"model.layer.*": 1.0})
    with pytest.raises(ConfigError, match=r"learning_rates.patterns 'model.layer.\*' .*layers\*'"):
        wrong.by_name(model, 0.1)
