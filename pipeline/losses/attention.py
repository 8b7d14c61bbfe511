"""Learning how the tokens of a text attend to one another, from queries, keys and values.

    query, key, value [M, heads, width] -- by document --> scores [G, heads, L, L] -> [M]

Only vectors are cached; what is quadratic in the length is made here, of a document at a time. The
value of a token is that of its row. All positions whose vectors are cached are related: those of a
whole text, or of a language model's document those that have a target.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses.base import Knowledge, StudentOutputs, Unit
from pipeline.losses.groups import Groups
from pipeline.losses.layers import MappedLoss

PartName = Literal["query", "key", "value"]


class AttentionLoss(MappedLoss, ABC):
    """What the losses of attention share.

    Attributes:
        layers: student layer -> teacher layer, 1 the first; the last of both where left out.
    """

    layers: dict[int, int] | Literal["uniform", "last"] = Field(
        default_factory=lambda: {-1: -1}, min_length=1
    )

    @property
    def unit(self) -> Unit:
        return "features"

    @property
    @abstractmethod
    def parts(self) -> tuple[PartName, ...]:
        """Which vectors it needs."""

    @property
    def compares(self) -> Mapping[str, str]:
        return {
            f"{part}.{mine}": f"{part}.{theirs}"
            for mine, theirs in self.layer_map.items()
            for part in self.parts
        }

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return the mean over the pairs of layers, [M]."""
        assert knowledge.documents is not None
        groups = Groups.of(knowledge.documents)
        values = []
        for mine, theirs in self.layer_map.items():
            own = {part: _float(student.hidden[f"{part}.{mine}"]) for part in self.parts}
            said = {part: _float(knowledge.hidden[f"{part}.{theirs}"]) for part in self.parts}
            values.append(groups.pick(self.compare(own, said, groups)))
        return torch.stack(values).mean(dim=0)

    @abstractmethod
    def compare(
        self, student: Mapping[PartName, Tensor], teacher: Mapping[PartName, Tensor], groups: Groups
    ) -> Tensor:
        """Compare one layer, [M, heads, width] by part: [G, L]."""


class MiniLM(AttentionLoss):
    """KL(teacher || student) of the relations of queries, of keys and of values among themselves.

    Wang et al. 2021, MiniLMv2, equations 5 to 8: softmax(A A^T / sqrt(width)) by relation head. The
    heads of a vector are joined and cut anew, so that teacher and student may differ in width and
    in heads. The mean over the relation heads, the sum over the relations. Tokens are related to
    all of their document, in a model that reads from left to right too.

    Attributes:
        relation_heads: more of them are finer; must divide the vectors' widths.
        relations: which vectors are related.
    """

    name: Literal["minilm"] = "minilm"
    relation_heads: int = Field(default=12, ge=1)
    relations: Annotated[tuple[PartName, ...], Field(min_length=1)] = ("query", "key", "value")

    @property
    def parts(self) -> tuple[PartName, ...]:
        return self.relations

    def compare(
        self, student: Mapping[PartName, Tensor], teacher: Mapping[PartName, Tensor], groups: Groups
    ) -> Tensor:
        found = []
        for part in self.relations:
            mine = self._cut(student[part], "student", part)
            theirs = self._cut(teacher[part], "teacher", part)
            found.append(_divergence(_scores(mine, mine, groups), _scores(theirs, theirs, groups)))
        return torch.stack(found).sum(dim=0)

    def _cut(self, rows: Tensor, who: str, part: str) -> Tensor:
        joined = rows.flatten(1)
        if joined.shape[1] % self.relation_heads:
            raise ConfigError(
                f"losses: minilm: relation_heads: {self.relation_heads} do not divide the"
                f" {joined.shape[1]} numbers of the {who}'s {part} vectors; choose a common divisor"
            )
        return torch.stack(joined.chunk(self.relation_heads, dim=1), dim=1)


class MapLoss(AttentionLoss):
    """What the losses of attention maps share: Q K^T / sqrt(width), head by head.

    What a model adds to or does before these scores is left out on both sides: rotary positions,
    norms of queries and keys, position biases (T5, ALiBi), caps. Of models with absolute positions
    (BERT, GPT-2) they are the model's own.

    Attributes:
        causal: a token sees those before it and itself; for models that read from left to right.
    """

    causal: bool = False

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("query", "key")

    def compare(
        self, student: Mapping[PartName, Tensor], teacher: Mapping[PartName, Tensor], groups: Groups
    ) -> Tensor:
        heads = student["query"].shape[1], teacher["query"].shape[1]
        if heads[0] != heads[1]:
            raise ConfigError(
                f"losses: {self.name}: the student has {heads[0]} attention heads, the teacher"
                f" {heads[1]}; give the student as many, or use minilm"
            )
        scores = [_scores(of["query"], of["key"], groups, self.causal) for of in (student, teacher)]
        return self.compare_maps(*scores)

    @abstractmethod
    def compare_maps(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare scores [G, heads, L, L], `_HIDDEN` where nothing is seen: [G, L]."""


class AttentionMSE(MapLoss):
    """Squared difference of the scores before the softmax, the mean over heads and tokens seen.

    Jiao et al. 2020, TinyBERT, equation 7.
    """

    name: Literal["attention_mse"] = "attention_mse"

    def compare_maps(self, student: Tensor, teacher: Tensor) -> Tensor:
        seen = teacher > _hidden(teacher)
        squares = torch.where(seen, student - teacher, 0.0).square().sum(dim=3)
        return (squares / seen.sum(dim=3).clamp(min=1)).mean(dim=1)


class AttentionKL(MapLoss):
    """KL(teacher || student) of the attention distributions, the mean over heads.

    Wang et al. 2020, MiniLM, equation 4.
    """

    name: Literal["attention_kl"] = "attention_kl"

    def compare_maps(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence(student, teacher)


def _float(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _hidden(scores: Tensor) -> float:
    """The score of what a token does not see; finite, so that differences are."""
    return torch.finfo(scores.dtype).min / 2


def _scores(rows: Tensor, columns: Tensor, groups: Groups, causal: bool = False) -> Tensor:
    """Scaled products within each group, [G, heads, L, L], of [M, heads, width].

    Columns of fewer heads are shared by as many rows (grouped-query attention).
    """
    columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], dim=1)
    left, right = (groups.pad(vectors).transpose(1, 2) for vectors in (rows, columns))
    scores = left @ right.mT / rows.shape[2] ** 0.5
    seen = groups.mask[:, None, None, :].expand_as(scores)
    if causal:
        seen = seen & torch.ones_like(scores, dtype=torch.bool).tril()
    return torch.where(seen, scores, _hidden(scores))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the softmax of scores [G, heads, L, L], the mean over heads: [G, L]."""
    own, said = (functional.log_softmax(scores, dim=3) for scores in (student, teacher))
    values: Tensor = (said.exp() * (said - own)).sum(dim=3).mean(dim=1)
    return values
