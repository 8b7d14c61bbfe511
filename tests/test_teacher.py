"""A teacher answers what the model itself would say."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_teachers import TOPICS, make_bert, make_llama
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MambaConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.capture import plan_batches
from pipeline.errors import ConfigError, ModelError, NumericalError
from pipeline.examples import CachedExample, Example
from pipeline.tasks.causal_lm import CausalLM
from pipeline.tasks.sequence_classification import SequenceClassification
from pipeline.teacher import (
    CaptureSpec,
    Teacher,
    require_isolation,
)

V = 300


def make_example(documents: Sequence[int], seed: int = 0, name: str = "a") -> Example:
    """Random tokens in documents; every token but the first of each is a target."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(2, V, sum(documents), dtype=np.int32)
    starts = np.cumsum([0, *documents])
    positions = np.setdiff1d(np.arange(len(ids) - 1), starts[1:] - 1).astype(np.int32)
    return Example(name, ids, np.array(documents, dtype=np.int32), positions, ids[positions + 1])


def ask(
    teacher: Teacher, examples: Sequence[Example], task: Any = None, **spec: Any
) -> list[CachedExample]:
    batch = (task or CausalLM()).batch(examples, 1)
    generator = torch.Generator().manual_seed(0)
    return teacher.capture(
        batch.inputs,
        batch.target_index,
        batch.feature_index,
        batch.examples,
        CaptureSpec(**{"top_k": V, "temperatures": (1.0, 2.0), **spec}),
        generator,
    ).examples()


def whole_logits(model: PreTrainedModel, ids: np.ndarray, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids).long()[None], **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_are_the_softmax_of_the_model_whatever_is_batched_and_packed(
    attention: str,
) -> None:
    model = make_llama()
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    packed = make_example([7, 20, 3], seed=1)
    single = make_example([11], seed=2)
    for example, found in zip(
        [packed, single], ask(Teacher(model, CausalLM(), V), [packed, single]), strict=True
    ):
        starts = np.cumsum([0, *example.segment_lengths])
        logits = torch.cat(
            [
                whole_logits(model, example.input_ids[a:b]).logits[0, : b - a - 1, :V]
                for a, b in pairwise(starts)
            ]
        )
        order = found.targets.ids.argsort(dim=1)
        for temperature in (1.0, 2.0):
            log_probs = found.targets.at(temperature).log_probs.gather(1, order)
            expected = torch.log_softmax(logits / temperature, dim=-1)
            torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_positions_beyond_one_chunk_of_logits_are_answered_in_order() -> None:
    teacher = Teacher(make_llama(), CausalLM(), V)
    example = make_example([60])
    whole = ask(teacher, [example])[0].targets
    teacher.chunk_elements = 7 * V
    parts = ask(teacher, [example])[0].targets
    assert torch.equal(parts.ids, whole.ids)
    torch.testing.assert_close(parts.logits, whole.logits)


def test_a_head_that_cannot_be_taken_apart_falls_back_to_the_whole_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output**3 / 10)
    with caplog.at_level(logging.WARNING):
        teacher = Teacher(model, CausalLM(), V)
    assert len(caplog.records) == 1
    assert "held in memory instead" in caplog.text
    example = make_example([9])
    found = ask(teacher, [example, make_example([20])])[0].targets
    own = whole_logits(model, example.input_ids).logits[0, :8, :V]
    torch.testing.assert_close(found.logits, own.topk(V).values, rtol=1e-4, atol=1e-4)


def test_layers_are_the_models_hidden_states_at_the_target_positions() -> None:
    model = make_llama()
    teacher = Teacher(model, CausalLM(), V)
    layers = teacher.name_layers([0, -1, 1])
    assert layers == {"layer.0": 0, "layer.2": 2, "layer.1": 1}
    example = make_example([13])
    found = ask(teacher, [example, make_example([31])], layers=layers, pooled=True)[0].hidden
    states = whole_logits(model, example.input_ids, output_hidden_states=True).hidden_states
    for name, index in layers.items():
        torch.testing.assert_close(found[name], states[index][0, :12], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], states[2].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_a_classifier_answers_once_per_text_and_keeps_every_tokens_state() -> None:
    model = make_bert()
    task = SequenceClassification(labels=TOPICS)
    teacher = Teacher(model, task, 3)
    texts = [make_example([length], seed=length) for length in (5, 23)]
    examples = [
        Example(e.example_id, e.input_ids, e.segment_lengths, np.zeros(1, np.int32), np.array([2]))
        for e in texts
    ]
    spec = {"top_k": 3, "layers": teacher.name_layers([-1]), "pooled": True}
    for example, found in zip(examples, ask(teacher, examples, task, **spec), strict=True):
        own = whole_logits(model, example.input_ids, output_hidden_states=True)
        expected = torch.log_softmax(own.logits[0], dim=0)
        torch.testing.assert_close(found.targets.label_log_probs[0], expected[2])
        state = own.hidden_states[-1][0]
        torch.testing.assert_close(found.hidden["layer.2"], state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.hidden["pooled"][0], state.mean(0), rtol=1e-4, atol=1e-5)


def test_a_bfloat16_teacher_answers_on_the_cpu() -> None:
    example = make_example([20])
    full = ask(Teacher(make_llama(), CausalLM(), V), [example])[0].targets
    half = ask(Teacher(make_llama().to(torch.bfloat16), CausalLM(), V), [example])[0].targets
    assert half.logits.dtype == torch.float32
    torch.testing.assert_close(half.label_log_probs, full.label_log_probs, rtol=0.1, atol=0.3)


def test_answers_carry_no_gradient_but_may_enter_one() -> None:
    targets = ask(Teacher(make_llama(), CausalLM(), V), [make_example([9])])[0].targets
    weight = torch.ones(V, requires_grad=True)
    (targets.logits * weight).sum().backward()
    assert not targets.logits.requires_grad
    assert weight.grad is not None


def test_logits_that_are_not_finite_name_their_example_and_position() -> None:
    model = make_llama()
    sick = make_example([9], seed=5, name="the sick one")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(sick.input_ids[4])] = torch.nan
    teacher = Teacher(model, CausalLM(), V)
    healthy = Example(
        "fine", np.full(6, 1, np.int32), np.array([6], np.int32), np.arange(5), np.ones(5)
    )
    with pytest.raises(NumericalError, match=r"'the sick one'.* at position \d are NaN"):
        ask(teacher, [healthy, sick])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_transformer_keeps_packed_documents_apart(attention: str) -> None:
    model = make_llama()
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    require_isolation(model, lambda rows: CausalLM().batch(rows, 1).inputs)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4),
        BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2),
    ],
)
def test_a_model_that_lets_packed_documents_see_one_another_is_refused(config: Any) -> None:
    torch.manual_seed(0)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=r"set task\.packing to false"):
        require_isolation(model, lambda rows: CausalLM().batch(rows, 1).inputs)


def test_a_model_that_numbers_positions_itself_is_asked_without_them() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2, use_cache=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    example = make_example([9])
    found = ask(Teacher(model, CausalLM(), V), [example, make_example([20])])[0].targets
    own = whole_logits(model, example.input_ids).logits[0, :8]
    torch.testing.assert_close(found.logits, own.topk(V).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    teacher = Teacher(make_llama(), CausalLM(), V)
    with pytest.raises(ConfigError, match=rf"has no layer {layer}; it has 0 .* to 2, or -3 to -1"):
        teacher.name_layers([layer])


def test_the_longest_sequence_leaves_out_positions_kept_for_padding() -> None:
    config = RobertaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=66,
    )
    teacher = Teacher(RobertaForSequenceClassification(config).eval(), SequenceClassification(), 2)
    assert teacher.max_positions == 64
    assert Teacher(make_llama(), CausalLM(), V).max_positions == 64


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), tokens=st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    batches = plan_batches(lengths, tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= tokens


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = [1, 50] * 50
    batches = plan_batches(lengths, 200)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded <= 1.05 * sum(lengths)


def test_a_twin_has_modules_of_its_own_over_the_same_tensors() -> None:
    model = make_llama()
    teacher = Teacher(model, CausalLM(), V)
    twin = teacher.twin()
    pairs = list(zip(model.named_modules(), twin.model.named_modules(), strict=True))
    assert all(mine is not other for (_, mine), (_, other) in pairs)
    for mine, other in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert mine is other
    rotary = twin.model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq * 2.0)
    assert not torch.equal(model.model.rotary_emb.inv_freq, rotary.inv_freq)


def test_a_teacher_on_a_cpu_is_asked_by_every_core_unless_it_is_moved_while_it_runs() -> None:
    teacher = Teacher(make_llama(), CausalLM(), V)
    assert teacher.workers == torch.get_num_threads()
    teacher.model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk"}
    assert teacher.workers == 1
