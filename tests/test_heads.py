"""The output head alone gives the logits of the whole model."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NanoChatConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from pipeline.errors import ModelError
from pipeline.heads import OutputHead

VOCABULARY = 99
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "stablelm": StableLmConfig(**SIZES),
    "phi (bias)": PhiConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gptj (bias)": GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "opt (projected)": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "gemma2 (soft-cap)": Gemma2Config(**SIZES, final_logit_softcapping=0.5),
    "gemma3 (soft-cap)": Gemma3TextConfig(**SIZES, final_logit_softcapping=0.5),
    "nanochat (soft-cap)": NanoChatConfig(**SIZES, final_logit_softcapping=0.5),
    "cohere (scale)": CohereConfig(**SIZES, logit_scale=0.25),
    "granite (divides)": GraniteConfig(**SIZES, logits_scaling=8.0),
    "hyperclovax (multiplies)": HyperCLOVAXConfig(**SIZES, logits_scaling=8.0),
    "falcon-h1 (multiplier)": FalconH1Config(
        **SIZES, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8
    ),
}


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lm_head.bias", "embed_out.bias")):
                parameter.normal_()  # a bias of zeros would not be missed
    return model.to(dtype)


def run(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = model.base_model(input_ids=input_ids).last_hidden_state
        return hidden, model(input_ids=input_ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_alone_gives_the_logits_of_the_model(name: str) -> None:
    model = make_model(CONFIGS[name])
    hidden, own = run(model)
    head = OutputHead.of(model, VOCABULARY)
    with torch.inference_mode():
        logits = head(hidden.flatten(0, 1))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, own.flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_scales_and_caps_change_the_logits_of_the_fixtures() -> None:
    heads = {
        name: OutputHead.of(make_model(config), VOCABULARY) for name, config in CONFIGS.items()
    }
    assert heads["cohere (scale)"].scale == 0.25
    assert heads["granite (divides)"].scale == 1 / 8
    assert heads["hyperclovax (multiplies)"].scale == 8.0
    assert heads["gemma2 (soft-cap)"].soft_cap == 0.5
    assert heads["phi (bias)"].bias is not None
    assert heads["llama"].scale == 1.0
    assert heads["llama"].soft_cap is None


def test_a_soft_cap_far_above_the_probed_logits_is_not_missed() -> None:
    config = Gemma2Config(**SIZES, final_logit_softcapping=1e4)
    assert OutputHead.of(make_model(config), VOCABULARY).soft_cap == 1e4


def test_a_bfloat16_head_rounds_as_the_model_does() -> None:
    model = make_model(CONFIGS["llama"], torch.bfloat16)
    hidden, own = run(model)
    with torch.inference_mode():
        logits = OutputHead.of(model, VOCABULARY)(hidden.flatten(0, 1))
    torch.testing.assert_close(logits, own.flatten(0, 1).float(), rtol=0, atol=1e-2)


def test_padded_rows_of_the_head_are_no_classes() -> None:
    model = make_model(CONFIGS["phi (bias)"])
    hidden, own = run(model)
    with torch.inference_mode():
        logits = OutputHead.of(model, 90)(hidden.flatten(0, 1))
    assert logits.shape == (22, 90)
    torch.testing.assert_close(logits, own.flatten(0, 1)[:, :90], rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_the_head_to_the_hidden_states() -> None:
    head = OutputHead.of(make_model(CONFIGS["gemma2 (soft-cap)"]), VOCABULARY)
    hidden = torch.randn(3, 32, requires_grad=True)
    head(hidden).sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) > 0


def test_a_vocabulary_larger_than_the_head_is_refused() -> None:
    with pytest.raises(ModelError, match="has 99 rows, the tokenizer has 120 ids"):
        OutputHead.of(make_model(CONFIGS["llama"]), 120)


def test_a_head_that_is_more_than_a_scaled_linear_map_is_refused() -> None:
    model = make_model(CONFIGS["llama"])
    model.lm_head.register_forward_hook(lambda module, inputs, output: output**3)
    with pytest.raises(ModelError, match="are no scaled, soft-capped linear map"):
        OutputHead.of(model, VOCABULARY)
