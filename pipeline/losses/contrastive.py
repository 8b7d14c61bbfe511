"""Learning to tell by the student's vector which example the teacher's vector is of.

student [B, D] -- project --> anchors      teacher [B, D'] + Bank -- project --> candidates
anchors x candidates / temperature --> scores [B, B + n] --> -log share of the right one, [B]
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.losses.base import Knowledge, Loss, StudentOutputs, Unit


class CRD(Loss):
    """Contrastive representation distillation of pooled vectors, Tian et al. 2020.

    Both sides are projected to unit vectors; the teacher's vector of the same example competes with
    those of the other examples of the micro-batch and with a memory of earlier ones. Taken as one
    choice among all candidates (InfoNCE, van den Oord et al. 2018), where the paper decides about
    each candidate by itself against a noise level that depends on the size of the data. A teacher's
    vectors never change, so those of the memory do not age. With DDP it is the first process's.

    Attributes:
        temperature: of the scores.
        width: of the projected vectors.
        memory: how many teacher vectors of earlier batches are kept.
    """

    name: Literal["crd"] = "crd"
    temperature: float = Field(default=0.07, gt=0.0)
    width: int = Field(default=128, ge=1)
    memory: int = Field(default=4096, ge=0)

    @property
    def unit(self) -> Unit:
        return "examples"

    @property
    def compares(self) -> Mapping[str, str]:
        return {"pooled": "pooled"}

    def projections(self, student_width: int, teacher_width: int) -> nn.ModuleDict:
        """A linear map for each side, drawn from torch's global generator, and the memory."""
        return nn.ModuleDict(
            {
                "student": nn.Linear(student_width, self.width),
                "teacher": nn.Linear(teacher_width, self.width),
                "bank": Bank(self.memory, teacher_width),
            }
        )

    def per_position(
        self, student: StudentOutputs, knowledge: Knowledge, projections: nn.ModuleDict
    ) -> Tensor:
        """Return -log of the share of the right candidate, [B]; it joins the memory in training."""
        bank = projections["bank"]
        assert isinstance(bank, Bank)
        theirs, keys = knowledge.hidden["pooled"], knowledge.example_keys
        assert keys is not None
        earlier, earlier_keys = bank.without(keys)
        anchors = _project(projections["student"], student.hidden["pooled"])
        candidates = _project(projections["teacher"], torch.cat([theirs.to(earlier), earlier]))
        scores = anchors @ candidates.T / self.temperature
        same = keys[:, None] == torch.cat([keys, earlier_keys])[None, :]
        right = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
        scores = scores.masked_fill(same & ~right, -torch.inf)  # the same example is no other
        if bank.training:
            bank.add(theirs, keys)
        return -functional.log_softmax(scores, dim=1).diagonal()


class Bank(nn.Module):
    """The last vectors of a teacher, by example; it is checkpointed with the student.

    Attributes:
        vectors: [N, D].
        keys: [N] int64, see `Knowledge.example_keys`.
        count: how many were added so far; the oldest make room.
    """

    vectors: Tensor
    keys: Tensor
    count: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def without(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors and keys of all examples but these, copied."""
        kept = self._filled & ~torch.isin(self.keys, keys)
        return self.vectors[kept], self.keys[kept]

    @torch.no_grad()
    def add(self, vectors: Tensor, keys: Tensor) -> None:
        """Remember the vectors of examples that are not held, in place of the oldest."""
        again = (keys[:, None] == keys[None, :]).tril(-1).any(dim=1)
        new = ~again & ~torch.isin(keys, self.keys[self._filled])
        vectors, keys = vectors[new][-len(self.keys) :], keys[new][-len(self.keys) :]
        if len(self.keys):
            places = (self.count + torch.arange(len(keys), device=keys.device)) % len(self.keys)
            self.vectors[places] = vectors.to(self.vectors)
            self.keys[places] = keys
        self.count += len(keys)

    @property
    def _filled(self) -> Tensor:
        return torch.arange(len(self.keys), device=self.keys.device) < self.count


def _project(projection: nn.Module, rows: Tensor) -> Tensor:
    """To unit vectors, in float32 or more."""
    found: Tensor = projection(rows.to(next(projection.parameters()).dtype))
    return functional.normalize(found.to(torch.promote_types(found.dtype, torch.float32)))
