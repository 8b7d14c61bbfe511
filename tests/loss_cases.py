"""Cases for the tests of the losses: every member, configured, with all it could want to see."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.heads import OutputHead
from pipeline.losses import LOSSES, Knowledge, Loss, StudentOutputs
from pipeline.losses.attention import AttentionLoss
from pipeline.losses.contrastive import CRD
from pipeline.losses.numbers import NumberLoss
from pipeline.losses.relations import RelationLoss
from pipeline.targets import UNLABELLED, Targets

V, PADDED, STUDENT_WIDTH, TEACHER_WIDTH = 7, 9, 3, 4
TEMPERATURES = (1.0, 2.0, 4.0)
DOCUMENT, HEADS = 3, 2  # positions; of attention vectors

# A member that is not named here is tested as it comes, without settings.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "forward_kl": [
        {"tail": tail, "temperature": temperature}
        for tail in ("bucket", "draws", "renormalise")
        for temperature in (1.0, 2.0)
    ],
    "reverse_kl": [{}, {"temperature": 2.0}],
    "jensen_shannon": [{"tail": "bucket"}, {"tail": "draws", "beta": 0.2, "temperature": 2.0}],
    "skew_kl": [{"tail": "bucket"}, {"tail": "draws", "reverse": True, "temperature": 2.0}],
    "total_variation": [{"tail": "bucket"}, {"tail": "draws", "temperature": 2.0}],
    "ranking": [{}, {"form": "hinge", "depth": 2, "margin": 30.0}],
    "cross_entropy": [
        {},
        {"label_smoothing": 0.1},
        {"positions": {"weight": "entropy"}, "class_weights": {0: 3.0, 4: 0.5}},
    ],
    "uld": [{"num_classes": V, "temperature": 2.0}, {}],
    "pseudo_label": [{"positions": {"weight": "confidence"}}],
    "hidden_mse": [
        {"layers": {1: -1}},
        {"layers": {0: 0, -1: 2}},
        {"layers": {1: -1}, "normalise": True},
        {"pooled": True},
    ],
    "hidden_cosine": [{"layers": {1: -1}}, {"layers": {0: 0, -1: 2}}, {"pooled": True}],
    "rkd_distance": [{"layers": {1: -1}}, {"pooled": True}],
    "rkd_angle": [{"layers": {0: 0, -1: 2}}, {"pooled": True}],
    "gram": [{"layers": {0: 0, -1: 2}}, {"pooled": True}],
    "cka": [{"layers": {1: -1}}],
    "crd": [{"width": 2, "memory": 8}],
    "minilm": [{"relation_heads": 2}, {"relation_heads": 1, "layers": {1: -1, -1: 1}}],
    "attention_mse": [{"layers": {1: -1}}, {"causal": True}],
    "attention_kl": [{"layers": {1: -1}}, {"causal": True}],
}


def all_losses() -> list[Loss]:
    """Every configured member of the family."""
    return [
        member.model_validate(config).hear(lambda: make_head(V, TEACHER_WIDTH))
        for name, member in LOSSES.items()
        for config in CONFIGS.get(name, [{}])
    ]


def make_head(classes: int, width: int, dtype: torch.dtype = torch.float64) -> OutputHead:
    """A teacher's output head."""
    return OutputHead(normal(1, classes, width, dtype=dtype), None, 1.0, None, classes)


def relates_rows(loss: Loss) -> bool:
    """Whether a value depends on more than its own position: on its document or its batch."""
    return isinstance(loss, RelationLoss | AttentionLoss | CRD)


def describe(loss: Loss) -> str:
    """A readable test id."""
    changed = loss.model_dump(exclude_defaults=True, exclude={"name"})
    return "-".join([loss.name, *(f"{key}={value}" for key, value in changed.items())])


def normal(
    seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Reproducible normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_targets(
    logits: Tensor, kept: int, draws: int = 0, temperatures: tuple[float, ...] = TEMPERATURES
) -> Targets:
    """Targets in the precision of dense logits [N, V], straight from the definition."""
    ids = logits.topk(kept, dim=1).indices
    tail = logits.softmax(dim=1).scatter(1, ids, 0.0)
    draw_ids = ids.new_empty(len(logits), draws)
    if draw_ids.numel():
        generator = torch.Generator().manual_seed(0)
        draw_ids = torch.multinomial(tail, draws, replacement=True, generator=generator)
    labels = torch.arange(len(logits)) % logits.shape[1]
    return Targets(
        ids=ids,
        logits=logits.gather(1, ids),
        draw_ids=draw_ids,
        draw_logits=logits.gather(1, draw_ids),
        logsumexp=torch.stack([(logits / t).logsumexp(dim=1) for t in temperatures], dim=1),
        label_ids=labels,
        label_log_probs=logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0],
        temperatures=temperatures,
        num_classes=logits.shape[1],
    )


@dataclass(frozen=True)
class Case:
    """A loss with inputs of n positions, each the leaf of a gradient.

    Targets, features and examples are n alike, so that one index picks positions of any unit.
    """

    loss: Loss
    leaves: dict[str, Tensor]
    knowledge: Knowledge
    projections: nn.ModuleDict

    def values(self) -> Tensor:
        """One value per unit position."""
        hidden = {signal: self.leaves[signal] for signal in self.loss.compares}
        student = StudentOutputs(self.leaves["logits"], hidden)
        return self.loss.per_position(student, self.knowledge, self.projections)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of the sum with respect to each leaf, 0 where there is none."""
        grads = torch.autograd.grad(
            self.values().sum(), list(self.leaves.values()), materialize_grads=True
        )
        return dict(zip(self.leaves, grads, strict=True))

    def counted(self) -> float:
        """The valid units, or their weights, which the sum is divided by."""
        weights = self.loss.weights(self.knowledge)
        if weights is not None:
            return float(weights.sum())
        if self.loss.unit == "labels":
            return int((self.knowledge.label_ids != UNLABELLED).sum())
        return len(self.leaves["logits"])

    def select(self, index: Tensor) -> "Case":
        """The same at some of the positions; the leaves stay those of the whole."""
        targets = self.knowledge.targets
        documents, keys = self.knowledge.documents, self.knowledge.example_keys
        assert targets is not None
        assert documents is not None and keys is not None
        knowledge = Knowledge(
            targets.select(index),
            self.knowledge.label_ids[index],
            {name: tensor[index] for name, tensor in self.knowledge.hidden.items()},
            documents[index],
            keys[index],
            numbers=None if self.knowledge.numbers is None else self.knowledge.numbers[index],
        )
        leaves = {name: leaf[index] for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves, knowledge=knowledge)

    def with_leaf(self, name: str, values: Tensor) -> "Case":
        """The same with other numbers in one leaf."""
        return replace(self, leaves={**self.leaves, name: values.detach().requires_grad_()})


def make_case(
    loss: Loss, positions: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Case:
    """A case with some positions unlabelled, a padded head and unequal widths."""
    leaves = {"logits": normal(seed, positions, PADDED, scale=2.0, dtype=dtype)}
    teacher = {}
    for number, (mine, theirs) in enumerate(loss.compares.items()):
        heads = [HEADS] if isinstance(loss, AttentionLoss) else []
        leaves[mine] = normal(seed + number + 2, positions, *heads, STUDENT_WIDTH, dtype=dtype)
        teacher[theirs] = normal(seed + number + 9, positions, *heads, TEACHER_WIDTH, dtype=dtype)
    for signal in set(loss.teacher_signals) - set(teacher):
        teacher[signal] = normal(seed + 8, positions, TEACHER_WIDTH, dtype=dtype)
    dense = normal(seed + 5, positions, V, scale=2.0, dtype=dtype)
    whole = isinstance(loss, NumberLoss)  # of which nothing may be cut off
    targets = make_targets(dense, V if whole else 3, draws=0 if whole else 2)
    labels = torch.arange(positions) % V
    labels[1::3] = UNLABELLED
    torch.manual_seed(seed)
    projections = loss.projections(STUDENT_WIDTH, TEACHER_WIDTH).to(dtype)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    rows = torch.arange(positions)
    given = normal(seed + 6, positions, V, dtype=dtype)
    given[labels == UNLABELLED] = torch.nan
    knowledge = Knowledge(
        targets, labels, teacher, rows // DOCUMENT, example_keys=rows, numbers=given
    )
    return Case(loss, leaves, knowledge, projections)
