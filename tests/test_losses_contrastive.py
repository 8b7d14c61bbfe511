"""CRD: the right teacher vector among those of other examples, earlier ones included."""

from pathlib import Path

import pytest
import torch
from loss_cases import normal
from small_runs import TINY, make_student_config, make_topic_cache, read_lines
from torch import Tensor, nn
from torch.nn import functional

from pipeline.losses import Knowledge, StudentOutputs
from pipeline.losses.contrastive import CRD, Bank
from stages.train_student import train_student


def make_projections(loss: CRD) -> nn.ModuleDict:
    torch.manual_seed(0)
    return loss.projections(3, 4).double()


def contrast(
    loss: CRD, projections: nn.ModuleDict, student: Tensor, teacher: Tensor, keys: list[int]
) -> Tensor:
    knowledge = Knowledge(
        None, torch.empty(0), {"pooled": teacher}, example_keys=torch.tensor(keys)
    )
    outputs = StudentOutputs(torch.empty(0, 1), {"pooled": student})
    return loss.per_position(outputs, knowledge, projections)


def held(projections: nn.ModuleDict) -> dict[int, Tensor]:
    """What the memory holds, by key."""
    bank = projections["bank"]
    assert isinstance(bank, Bank)
    vectors, keys = bank.without(torch.empty(0, dtype=torch.int64))
    return dict(zip(keys.tolist(), vectors, strict=True))


def test_the_value_is_the_surprise_at_the_right_one_of_all_candidates() -> None:
    loss = CRD(width=2, memory=4, temperature=0.5)
    projections = make_projections(loss)
    earlier = normal(9, 2, 4)
    contrast(loss, projections, normal(8, 2, 3), earlier, [7, 8])
    student, teacher = normal(0, 3, 3), normal(1, 3, 4)
    found = contrast(loss, projections, student, teacher, [1, 2, 3])
    anchors = functional.normalize(projections["student"](student))
    candidates = functional.normalize(projections["teacher"](torch.cat([teacher, earlier])))
    scores = anchors @ candidates.T / 0.5
    torch.testing.assert_close(
        found, functional.cross_entropy(scores, torch.arange(3), reduction="none")
    )


def test_another_text_of_the_same_example_is_no_wrong_answer() -> None:
    loss = CRD(width=2, memory=0)
    projections = make_projections(loss)
    student, teacher = normal(0, 3, 3), normal(1, 3, 4)
    teacher[1] = teacher[0]
    both = contrast(loss, projections, student, teacher, [1, 1, 2])
    for alone, rows in ((0, [0, 2]), (1, [1, 2])):
        found = contrast(loss, projections, student[rows], teacher[rows], [1, 2])
        torch.testing.assert_close(both[alone], found[0])
    only = contrast(loss, projections, student[:2], teacher[:2], [1, 1])
    assert only.tolist() == [0.0, 0.0]


def test_the_memory_holds_the_last_examples_once_each() -> None:
    loss = CRD(width=2, memory=4)
    projections = make_projections(loss)
    vectors = normal(1, 9, 4)
    for keys in ([0, 1, 1], [2, 0], [3, 4, 5]):
        contrast(loss, projections, normal(0, len(keys), 3), vectors[keys], keys)
    assert sorted(held(projections)) == [2, 3, 4, 5]
    for key, vector in held(projections).items():
        assert torch.equal(vector, vectors[key])
    contrast(loss, projections, normal(0, 6, 3), vectors[:6], list(range(6)))
    assert len(held(projections)) == 4


def test_asking_again_changes_nothing_and_evaluation_remembers_nothing() -> None:
    loss = CRD(width=2, memory=8)
    projections = make_projections(loss)
    student, teacher = normal(0, 3, 3), normal(1, 3, 4)
    found = [contrast(loss, projections, student, teacher, [1, 2, 3]) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    projections.eval()
    contrast(loss, projections, normal(2, 2, 3), normal(3, 2, 4), [4, 5])
    assert sorted(held(projections)) == [1, 2, 3]


def test_the_memory_is_part_of_a_checkpoint() -> None:
    loss = CRD(width=2, memory=3)
    projections, fresh = make_projections(loss), make_projections(loss)
    contrast(loss, projections, normal(0, 5, 3), normal(1, 5, 4), [1, 2, 3, 4, 5])
    fresh.load_state_dict(projections.state_dict())
    contrast(loss, projections, normal(2, 1, 3), normal(3, 1, 4), [6])
    contrast(loss, fresh, normal(2, 1, 3), normal(3, 1, 4), [6])
    assert held(fresh).keys() == held(projections).keys() and len(held(fresh)) == 3


def test_a_student_comes_to_tell_the_examples_apart() -> None:
    loss = CRD(width=8, memory=16)
    torch.manual_seed(0)
    projections = loss.projections(6, 8)
    student = normal(0, 24, 6, dtype=torch.float32)
    teacher = student @ normal(1, 6, 8, dtype=torch.float32)
    optimizer = torch.optim.Adam(projections.parameters(), lr=0.02)
    values = []
    for step in range(120):
        keys = [(8 * step + i) % 24 for i in range(8)]
        value = contrast(loss, projections, student[keys], teacher[keys], keys).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.1 < 1.0 < values[3]


@pytest.mark.parametrize("memory", [0, 8])
def test_a_student_is_trained_against_the_bank_of_its_cache(tmp_path: Path, memory: int) -> None:
    cache = make_topic_cache(tmp_path)
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={"from": "scratch", "architecture": "bert", **TINY},
        losses=[{"name": "crd", "memory": memory, "width": 16, "temperature": 0.2}],
        training={"num_train_epochs": 15, "logging_steps": 1, "learning_rate": 1e-2},
    )
    lines = read_lines(train_student(config))
    terms = [line["term/crd"] for line in lines if line["split"] == "train"]
    assert sum(terms[-3:]) < 0.8 * sum(terms[3:6])  # of full batches, the memory filled
