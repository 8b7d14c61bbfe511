"""MiniLM's relations and attention maps: from vectors alone, a document at a time."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import normal
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from pipeline.attention import watch_attention
from pipeline.errors import ConfigError
from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.attention import AttentionKL, AttentionLoss, AttentionMSE, MiniLM

PARTS = ("query", "key", "value")
MEMBERS: list[AttentionLoss] = [MiniLM(relation_heads=2), AttentionMSE(), AttentionKL()]
every_member = pytest.mark.parametrize("loss", MEMBERS, ids=lambda loss: loss.name)


def vectors(seed: int, rows: int, heads: int, width: int) -> dict[str, Tensor]:
    return {part: normal(seed + i, rows, heads, width) for i, part in enumerate(PARTS)}


def compare(
    loss: AttentionLoss,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    documents: Tensor | None = None,
) -> Tensor:
    if documents is None:
        documents = torch.zeros(len(student["query"]), dtype=torch.int64)
    mine, theirs = ({f"{p}.-1": rows for p, rows in of.items()} for of in (student, teacher))
    knowledge = Knowledge(None, torch.empty(0), theirs, documents)
    return loss.per_position(StudentOutputs(torch.empty(0, 1), mine), knowledge, nn.ModuleDict())


@every_member
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_equal_vectors_cost_nothing_and_pull_nowhere(loss: AttentionLoss, seed: int) -> None:
    teacher = vectors(seed, 5, 2, 4)
    student = {part: rows.clone().requires_grad_() for part, rows in teacher.items()}
    found = compare(loss, student, teacher)
    grads = torch.autograd.grad(found.sum(), list(student.values()), materialize_grads=True)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-10)


@every_member
def test_documents_of_any_lengths_stay_apart(loss: AttentionLoss) -> None:
    student, teacher = vectors(0, 7, 2, 3), vectors(5, 7, 2, 4)
    documents = torch.tensor([0, 0, 0, 1, 3, 3, 3])
    found = compare(loss, student, teacher, documents)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        mine, theirs = ({p: v[rows] for p, v in of.items()} for of in (student, teacher))
        torch.testing.assert_close(found[rows], compare(loss, mine, theirs, documents[rows]))
    assert (found[documents != 1] > 0).all()


@pytest.mark.parametrize("relation_heads", [1, 2, 3, 6])
def test_minilm_relates_vectors_of_any_width_in_any_number_of_heads(relation_heads: int) -> None:
    student, teacher = vectors(0, 5, 2, 3), vectors(5, 5, 4, 6)
    expected = torch.zeros(5, dtype=torch.float64)
    for part in PARTS:
        relations = []
        for rows in (student[part], teacher[part]):
            cut = rows.reshape(5, relation_heads, -1).transpose(0, 1)
            relations.append((cut @ cut.mT / cut.shape[2] ** 0.5).softmax(dim=2))
        own, said = relations
        expected += (said * (said / own).log()).sum(dim=2).mean(dim=0)
    loss = MiniLM(relation_heads=relation_heads)
    torch.testing.assert_close(compare(loss, student, teacher), expected)


def test_minilm_relates_what_is_chosen_only() -> None:
    student, teacher = vectors(0, 5, 2, 4), vectors(5, 5, 2, 4)
    parts = [
        compare(MiniLM(relation_heads=2, relations=(part,)), student, teacher) for part in PARTS
    ]
    together = compare(MiniLM(relation_heads=2), student, teacher)
    torch.testing.assert_close(together, parts[0] + parts[1] + parts[2])
    assert dict(MiniLM(relations=("value",)).compares) == {"value.-1": "value.-1"}


def test_relation_heads_that_divide_no_vector_are_refused() -> None:
    student, teacher = vectors(0, 5, 2, 4), vectors(5, 5, 2, 6)
    with pytest.raises(ConfigError, match="3 do not divide the 8 numbers of the student's query"):
        compare(MiniLM(relation_heads=3), student, teacher)
    with pytest.raises(ConfigError, match="8 do not divide the 12 numbers of the teacher's query"):
        compare(MiniLM(relation_heads=8), student, teacher)


@pytest.mark.parametrize("loss", [AttentionMSE(), AttentionKL()], ids=lambda loss: loss.name)
def test_maps_of_other_numbers_of_heads_are_refused(loss: AttentionLoss) -> None:
    with pytest.raises(ConfigError, match=r"has 2 attention heads, the teacher 3; .* use minilm"):
        compare(loss, vectors(0, 5, 2, 4), vectors(5, 5, 3, 4))


@pytest.mark.parametrize("causal", [False, True])
def test_maps_are_compared_as_in_the_papers(causal: bool) -> None:
    student, teacher = vectors(0, 5, 2, 3), vectors(5, 5, 2, 4)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() if causal else torch.ones(5, 5).bool()
    scores = [
        of["query"].transpose(0, 1) @ of["key"].permute(1, 2, 0) / of["key"].shape[2] ** 0.5
        for of in (student, teacher)
    ]
    squares = ((scores[0] - scores[1]).square() * seen).sum(dim=2) / seen.sum(dim=1)
    found = compare(AttentionMSE(causal=causal), student, teacher)
    torch.testing.assert_close(found, squares.mean(dim=0))
    own, said = (of.masked_fill(~seen, -torch.inf).softmax(dim=2) for of in scores)
    divergence = torch.where(seen, said * (said / own).log(), 0.0).sum(dim=2).mean(dim=0)
    found = compare(AttentionKL(causal=causal), student, teacher)
    torch.testing.assert_close(found, divergence)


def test_keys_that_several_queries_share_are_repeated() -> None:
    """Grouped-query attention."""
    student, teacher = vectors(0, 5, 4, 3), vectors(5, 5, 4, 3)
    few = {**student, "key": student["key"][:, :2]}
    repeated = {**student, "key": few["key"].repeat_interleave(2, dim=1)}
    loss = AttentionKL()
    torch.testing.assert_close(compare(loss, few, teacher), compare(loss, repeated, teacher))


@torch.no_grad()
def test_the_maps_of_a_padded_bert_are_its_own() -> None:
    """KL(teacher || student) from what BERT itself returns as its attention."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    models = [BertModel._from_config(config, attn_implementation="eager").eval() for _ in range(2)]
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs = {"input_ids": ids, "attention_mask": mask}
    signals = [f"{part}.-1" for part in PARTS]
    maps, kept = [], []
    for model in models:
        with watch_attention(model, signals) as seen:
            maps.append(model(**inputs, output_attentions=True).attentions[-1])
        rows = {name.partition(".")[0]: of[mask.bool()] for name, of in seen.items()}
        kept.append(rows)
    said, own = maps
    terms = torch.where(said > 0, said * (said / own).log(), 0.0).sum(dim=3).mean(dim=1)
    documents = torch.tensor([0] * 6 + [1] * 4)
    found = compare(AttentionKL(), kept[1], kept[0], documents)
    torch.testing.assert_close(found, terms[mask.bool()], rtol=1e-4, atol=1e-5)
