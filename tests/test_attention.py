"""Queries, keys and values as the projections of attention give them, family by family."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, XLNetConfig, XLNetModel

from pipeline.attention import PARTS, find_attention, name_attention, watch_attention
from pipeline.errors import ConfigError, ModelError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of each family what its config needs beside the sizes, and the projection that follows attention.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "encoder.layer.1.attention.output.dense"),
    "xlm-roberta": ({}, "encoder.layer.1.attention.output.dense"),
    "electra": ({"embedding_size": 16}, "encoder.layer.1.attention.output.dense"),
    "distilbert": ({"hidden_dim": 24}, "transformer.layer.1.attention.out_lin"),
    "deberta-v2": ({}, "encoder.layer.1.attention.output.dense"),
    "mpnet": ({}, "encoder.layer.1.attention.attn.o"),
    "modernbert": ({"cls_token_id": 1, "sep_token_id": 2}, "layers.1.attn.Wo"),
    "gpt2": ({}, "h.1.attn.c_proj"),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 16}, "decoder.layers.1.self_attn.out_proj"),
    "llama": ({"num_key_value_heads": 2}, "layers.1.self_attn.o_proj"),
    "qwen2": ({"num_key_value_heads": 1}, "layers.1.self_attn.o_proj"),
    "mistral": ({"num_key_value_heads": 2, "head_dim": 4}, "layers.1.self_attn.o_proj"),
    "gemma": ({"num_key_value_heads": 1, "head_dim": 8}, "layers.1.self_attn.o_proj"),
    "phi3": ({"num_key_value_heads": 2}, "layers.1.self_attn.o_proj"),
    "gpt_neox": ({}, "layers.1.attention.dense"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "h.1.self_attention.dense"),
    "falcon": ({"num_kv_heads": 2, "new_decoder_architecture": True}, "h.1.self_attention.dense"),
    "t5": (
        {"d_model": 16, "num_layers": 2, "num_heads": 4, "d_kv": 4, "d_ff": 24},
        "decoder.block.1.layer.0.SelfAttention.o",
    ),
}
ROTARY = ("llama", "qwen2", "mistral", "gemma", "gpt_neox")
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_model(family: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    own, _ = FAMILIES[family]
    sizes = {} if family == "t5" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, "vocab_size": 50, **own})
    return AutoModel.from_config(config, attn_implementation=implementation).eval()


def make_inputs(model: Any, tokens: int = 6) -> dict[str, Tensor]:
    ids = 3 + torch.arange(2 * tokens).view(2, tokens) * 7 % 45
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def watch(model: Any, signals: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with watch_attention(model, signals) as seen:
        model(**inputs)
    return dict(seen)


@every_family
@torch.no_grad()
def test_of_one_token_attention_gives_its_value(family: str) -> None:
    model = make_model(family)
    given: list[Tensor] = []
    after = model.get_submodule(FAMILIES[family][1])
    after.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    values = watch(model, ["value.2"], make_inputs(model, tokens=1))["value.2"]
    heads = model.config.num_attention_heads // values.shape[2]
    expected = values.repeat_interleave(heads, dim=2).flatten(2)
    torch.testing.assert_close(given[0].view_as(expected), expected)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "gpt2", "opt", *ROTARY])
@torch.no_grad()
def test_queries_and_keys_give_the_models_own_attention_maps(family: str) -> None:
    """Of rotary models where all positions are 0, since what is seen is not rotated yet."""
    model = make_model(family)
    inputs = make_inputs(model)
    if family in ROTARY:
        inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    else:
        inputs["attention_mask"][1, 4:] = 0
    seen = watch(model, ["query.-1", "key.-1"], inputs)
    expected = model(**inputs, output_attentions=True).attentions[-1]
    query, key = (seen[name].transpose(1, 2) for name in ("query.-1", "key.-1"))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    hidden = inputs["attention_mask"][:, None, None, :] == 0
    if family not in ("bert", "distilbert", "electra"):
        hidden = hidden | torch.ones(6, 6, dtype=torch.bool).triu(1)
    found = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    kept = inputs["attention_mask"].bool()[:, None, :].expand(found.shape[:3])
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox", "t5"])
def test_every_implementation_of_attention_shows_the_same(family: str) -> None:
    signals = [f"{part}.1" for part in PARTS]
    seen = []
    for implementation in ("eager", "sdpa"):
        model = make_model(family, implementation)
        seen.append(watch(model, signals, make_inputs(model)))
    for signal in signals:
        torch.testing.assert_close(seen[0][signal], seen[1][signal])


@every_family
def test_shapes_are_known_before_the_model_is_called(family: str) -> None:
    model = make_model(family)
    shapes = name_attention(model, [1, -1])
    assert sorted(shapes) == [f"{part}.{layer}" for part in sorted(PARTS) for layer in (1, 2)]
    seen = watch(model, list(shapes), make_inputs(model))
    assert {name: tuple(vectors.shape[2:]) for name, vectors in seen.items()} == {
        name: (shape.heads, shape.width) for name, shape in shapes.items()
    }
    assert shapes["query.1"].heads == model.config.num_attention_heads


def test_a_decoder_is_meant_where_there_is_one_and_its_cross_attention_is_not() -> None:
    model = make_model("t5")
    own = [part["query"].projection for part in find_attention(model)]
    assert own == [model.decoder.block[i].layer[0].SelfAttention.q for i in range(2)]


def test_no_hook_stays_behind_and_gradients_flow() -> None:
    model = make_model("bert")
    with watch_attention(model, ["key.-1"]) as seen:
        model(**make_inputs(model))
    seen.pop("key.-1").sum().backward()
    assert model.encoder.layer[1].attention.self.key.weight.grad is not None
    model(**make_inputs(model))
    assert not seen
    assert not any(module._forward_hooks for module in find_attention_modules(model))


def find_attention_modules(model: Any) -> list[Any]:
    return [part.projection for layer in find_attention(model) for part in layer.values()]


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    model = make_model("bert")
    with pytest.raises(ConfigError, match=f"layer {layer}: the model has layers 1 to 2, or -2 to"):
        name_attention(model, [layer])
    with (
        pytest.raises(ConfigError, match="layers 1 to 2"),
        watch_attention(model, [f"key.{layer}"]),
    ):
        pass


def test_attention_of_another_make_is_refused() -> None:
    config = XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=24)
    with pytest.raises(
        ModelError, match=r"XLNetModel: .* of its 2 layers are not where .* \(0 were"
    ):
        name_attention(XLNetModel(config), [-1])
    bert = BertModel(BertConfig(**SIZES))
    bert.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match=r"its 3 layers are not where .* \(2 were found\); leave"):
        name_attention(bert, [-1])
