"""Learning how vectors relate to one another, whatever their widths: no projection is needed.

    student [n, D], teacher [n, D'] -- in groups --> relations of each group -- compare --> [n]

Rows are related within their group: tokens within their document, pooled vectors within the
micro-batch on this device, which is the only thing here that a split of the step changes. The value
of row i is its own share of its group's loss, so that the mean over the rows is the loss of the
paper; a group too small to have the relation has the value 0.
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.losses.base import Knowledge, StudentOutputs
from pipeline.losses.groups import Groups
from pipeline.losses.layers import LayerLoss

_TINY = 1e-12  # lengths below it are none: they have no direction and are not divided by


class RelationLoss(LayerLoss):
    """What the relations share: which rows are related.

    Attributes:
        window: tokens are related within runs of at most so many; None for whole documents.
    """

    window: int | None = Field(default=None, ge=3)

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return the mean over the pairs of layers, [M] (or [B] for pooled)."""
        pairs = [(mine, theirs) for _, mine, theirs in self.pairs(student, knowledge)]
        groups = self._group(pairs[0][0], knowledge)
        values = []
        for mine, theirs in pairs:
            rows = mine.to(torch.promote_types(mine.dtype, torch.float32))
            found = self.relate(groups.pad(rows), groups.pad(theirs.to(rows)), groups)
            values.append(groups.pick(found))
        return torch.stack(values).mean(dim=0)

    def _group(self, rows: Tensor, knowledge: Knowledge) -> Groups:
        if self.pooled:
            return Groups.of(torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
        assert knowledge.documents is not None
        return Groups.of(knowledge.documents, self.window)

    @abstractmethod
    def relate(self, student: Tensor, teacher: Tensor, groups: Groups) -> Tensor:
        """Compare the relations of [G, L, D] with those of [G, L, D'], zeros where there is no row:
        [G, L]."""


class RKDDistance(RelationLoss):
    """Huber loss of the distances to the other rows, over the mean distance of the group.

    Park et al. 2019, Relational Knowledge Distillation, equations 3 to 5. Blind to rotation, shift
    and scale.
    """

    name: Literal["rkd_distance"] = "rkd_distance"

    def relate(self, student: Tensor, teacher: Tensor, groups: Groups) -> Tensor:
        pairs = groups.pairs
        mine, theirs = (_distances(rows, pairs) for rows in (student, teacher))
        values = functional.smooth_l1_loss(mine, theirs, reduction="none")
        return (values * pairs).sum(dim=2) / (groups.sizes - 1).clamp(min=1)


class RKDAngle(RelationLoss):
    """Huber loss of the cosines of the angles at a row, over all pairs of other rows.

    Park et al. 2019, Relational Knowledge Distillation, equations 6 and 7. Blind to rotation, shift
    and scale. n rows of a group take n³ cosines of n² D numbers, hence the small window.
    """

    name: Literal["rkd_angle"] = "rkd_angle"
    window: int | None = Field(default=16, ge=3)

    def relate(self, student: Tensor, teacher: Tensor, groups: Groups) -> Tensor:
        pairs = groups.pairs
        mine, theirs = (_cosines(rows) for rows in (student, teacher))
        angles = pairs[:, :, :, None] & pairs[:, :, None, :] & pairs[:, None, :, :]
        values = functional.smooth_l1_loss(mine, theirs, reduction="none") * angles
        count = (groups.sizes - 1) * (groups.sizes - 2)
        return values.sum(dim=(2, 3)) / count.clamp(min=1)


class Gram(RelationLoss):
    """Squared difference of the rows of the Gram matrices, each brought to length 1.

    Tung and Mori 2019, Similarity-Preserving Knowledge Distillation, equations 1 to 4. Blind to
    rotation and scale.
    """

    name: Literal["gram"] = "gram"

    def relate(self, student: Tensor, teacher: Tensor, groups: Groups) -> Tensor:
        mine, theirs = (_unit(rows @ rows.mT) for rows in (student, teacher))
        return (mine - theirs).square().sum(dim=2) / groups.sizes


class CKA(RelationLoss):
    """1 - linear centred kernel alignment of the group, the same for each of its rows.

    Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, as a loss:
    Dasgupta and Cohn 2025, Improving Language Model Distillation through Hidden State Matching.
    Blind to rotation, shift and scale. It is near 0 for any two layers where a group has fewer rows
    than the vectors have numbers, so it wants long documents or large batches.
    """

    name: Literal["cka"] = "cka"

    def relate(self, student: Tensor, teacher: Tensor, groups: Groups) -> Tensor:
        mine, theirs = (_centred_gram(rows, groups) for rows in (student, teacher))
        norms = [gram.square().sum(dim=(1, 2)) for gram in (mine, theirs)]
        varied = (norms[0] > 0) & (norms[1] > 0)
        alignment = (mine * theirs).sum(dim=(1, 2)) / _where(varied, norms[0] * norms[1]).sqrt()
        return torch.where(varied, 1.0 - alignment, 0.0)[:, None].expand(groups.mask.shape)


def _where(known: Tensor, values: Tensor) -> Tensor:
    """1 in place of what is not known, so that neither it nor its gradient is divided by 0."""
    return torch.where(known, values, 1.0)


def _unit(rows: Tensor) -> Tensor:
    """[..., D] brought to length 1; what has no length stays 0 and has no gradient."""
    squares = rows.square().sum(dim=-1, keepdim=True)
    long = squares > _TINY**2
    return torch.where(long, rows / _where(long, squares).sqrt(), 0.0)


def _distances(rows: Tensor, pairs: Tensor) -> Tensor:
    """Distances [G, L, L] of [G, L, D], over the mean of the group's pairs."""
    found = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") * pairs
    mean = found.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
    long = mean > _TINY
    return torch.where(long[:, None, None], found / _where(long, mean)[:, None, None], 0.0)


def _cosines(rows: Tensor) -> Tensor:
    """[g, j, i, k] = the cosine of the angle at row j between rows i and k, of [G, L, D]."""
    directions = _unit(rows[:, None, :, :] - rows[:, :, None, :])
    return directions @ directions.mT


def _centred_gram(rows: Tensor, groups: Groups) -> Tensor:
    """[G, L, L] of [G, L, D] around the mean of each group, which is brought to length 1."""
    mean = rows.sum(dim=1, keepdim=True) / groups.sizes[:, :, None]
    centred = (rows - mean) * groups.mask[:, :, None]
    scaled = _unit(centred.flatten(1)).view_as(centred)
    return scaled @ scaled.mT
