"""Students in int8: the arithmetic by its definition, and folders that open as they were saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_teachers import make_bert, make_llama
from small_translators import make_t5
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5Model,
)

from pipeline.errors import ModelError
from pipeline.export import load_int8, quantize, save_int8
from pipeline.student.bag import HashedBagConfig, HashedBagForSequenceClassification


def make_gpt2() -> PreTrainedModel:
    """Linear maps stored the other way round, and a head tied to the embeddings."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, initializer_range=0.3, **sizes)).eval()


def make_bag() -> PreTrainedModel:
    torch.manual_seed(0)
    config = HashedBagConfig(vocab_size=300, num_labels=3, num_hidden_layers=1)
    return HashedBagForSequenceClassification(config).eval()


MODELS = {
    "llama": (make_llama, "AutoModelForCausalLM"),
    "tied": (lambda: make_llama(tie_word_embeddings=True), "AutoModelForCausalLM"),
    "gpt2": (make_gpt2, "AutoModelForCausalLM"),
    "bert": (make_bert, "AutoModelForSequenceClassification"),
    "bag": (make_bag, "AutoModelForSequenceClassification"),
}
IDS = torch.arange(3, 19).reshape(2, 8) * 7 % 300


def answer(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def quantized(module: nn.Module) -> nn.Module:
    """The module in int8."""
    holder = nn.Sequential(module)
    quantize(holder)
    return holder[0]


def test_a_linear_map_in_int8_is_the_product_of_rounded_integers() -> None:
    torch.manual_seed(1)
    linear, rows = nn.Linear(20, 5), torch.randn(3, 4, 20, dtype=torch.float32) * 10
    levels = []
    for numbers in (rows.double(), linear.weight.double()):
        scale = numbers.abs().amax(-1, keepdim=True) / 127
        levels.append(((numbers / scale).round().long(), scale))
    (x, x_scale), (w, w_scale) = levels
    expected = (x @ w.T) * x_scale * w_scale[:, 0] + linear.bias.double()
    found = quantized(linear)(rows)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_stands_on_the_levels_of_int8_stays_as_it_is() -> None:
    torch.manual_seed(2)
    linear, embedding = nn.Linear(16, 4), nn.Embedding(9, 16)
    for module in (linear, embedding):
        whole = torch.randint(-126, 127, module.weight.shape).float()
        whole[:, 0] = 127.0
        module.weight.data = whole * 0.5
    rows = torch.randint(-126, 127, (6, 16)).float()
    rows[:, 1] = -127.0
    assert torch.allclose(quantized(linear)(rows), linear(rows), rtol=1e-6, atol=1e-3)
    ids = torch.arange(9)[None]
    assert torch.equal(quantized(embedding)(ids), embedding(ids))


def test_rows_of_zeros_stay_zeros() -> None:
    linear, embedding = nn.Linear(4, 3, bias=False), nn.Embedding(2, 4)
    nn.init.zeros_(embedding.weight)
    assert torch.equal(quantized(linear)(torch.zeros(2, 4)), torch.zeros(2, 3))
    assert torch.equal(quantized(embedding)(torch.tensor([1])), torch.zeros(1, 4))


@pytest.mark.parametrize("name", MODELS)
def test_a_student_in_int8_is_near_itself_and_opens_as_it_was_saved(
    name: str, tmp_path: Path
) -> None:
    make, auto_class = MODELS[name]
    model = make()
    before, total = answer(model), model.num_parameters()
    count = save_int8(model, auto_class, tmp_path)
    assert 0.9 * total < count <= total
    saved = answer(model)
    assert 0.99 < torch.cosine_similarity(saved.flatten(), before.flatten(), dim=0) < 1
    state = torch.random.get_rng_state()
    assert torch.equal(answer(load_int8(tmp_path)), saved)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (tmp_path / "int8.safetensors").stat().st_size < 0.4 * 4 * total


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_tied_weights_are_written_once_and_stay_tied(name: str, tmp_path: Path) -> None:
    make, auto_class = MODELS[name]
    model = make()
    save_int8(model, auto_class, tmp_path)
    with safe_open(tmp_path / "int8.safetensors", "pt") as file:
        tall = [key for key in file.keys() if file.get_slice(key).get_shape()[0] >= 300]  # noqa: SIM118
    assert len([key for key in tall if key.endswith("weight")]) == 1
    opened = load_int8(tmp_path)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight


def test_one_embedding_under_several_names_is_replaced_everywhere() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5Model(T5Config(vocab_size=50, **sizes)).eval()
    quantize(model)
    assert model.shared.weight.dtype == torch.int8
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight is model.shared.weight
    ids = torch.tensor([[4, 7]])
    assert model(input_ids=ids, decoder_input_ids=ids).last_hidden_state.isfinite().all()


def test_scaled_embeddings_are_scaled_and_shifted_positions_stay_as_they_are() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    config = BartConfig(vocab_size=300, scale_embedding=True, max_position_embeddings=16, **sizes)
    model = BartModel(config).eval()
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    before = model(**given).last_hidden_state
    quantize(model)
    assert model.shared.weight.dtype == torch.int8 and model.shared.factor == pytest.approx(4.0)
    assert model.encoder.embed_positions.weight.dtype == torch.float32
    after = model(**given).last_hidden_state
    assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.999


def test_a_student_in_int8_writes_as_its_generation_config_says(tmp_path: Path) -> None:
    model = make_t5()
    model.generation_config.max_new_tokens = 6
    model.generation_config.decoder_start_token_id = 7
    save_int8(model, "AutoModelForSeq2SeqLM", tmp_path)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    expected = model.generate(**given)
    opened = load_int8(tmp_path)
    assert opened.generation_config.decoder_start_token_id == 7
    assert torch.equal(opened.generate(**given), expected)


def test_transformers_does_not_take_the_integers_for_weights(tmp_path: Path) -> None:
    save_int8(make_llama(), "AutoModelForCausalLM", tmp_path)
    with pytest.raises(OSError, match="model"):
        type(make_llama()).from_pretrained(tmp_path)


def test_a_folder_without_an_int8_student_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no int8 student"):
        load_int8(tmp_path)
    (tmp_path / "int8.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="holds no int8 student"):
        load_int8(tmp_path)


def test_a_file_that_does_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    save_int8(make_llama(), "AutoModelForCausalLM", tmp_path)
    make_llama(num_hidden_layers=3).config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2"):
        load_int8(tmp_path)
    make_llama(num_hidden_layers=1).config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has the unknown model\.layers\.1"):
        load_int8(tmp_path)
    make_llama(intermediate_size=40).config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        load_int8(tmp_path)
