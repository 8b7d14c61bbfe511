"""Rows that are compared with one another: those of a document, or of a whole batch.

rows [M, ...] -- pad --> [G, L, ...] -- compare within each group --> [G, L] -- pick --> [M]
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """How M rows divide into G groups of at most L.

    Attributes:
        group, place: [M] int64, where each row goes.
        mask: [G, L], False where a group is shorter than the longest.
    """

    group: Tensor
    place: Tensor
    mask: Tensor

    @staticmethod
    def of(numbers: Tensor, window: int | None = None) -> "Groups":
        """Group rows that follow one another and have one number.

        Args:
            numbers: [M] int64.
            window: groups are cut after so many rows.
        """
        _, group, counts = torch.unique_consecutive(
            numbers, return_inverse=True, return_counts=True
        )
        rows = torch.arange(len(numbers), device=numbers.device)
        place = rows - (counts.cumsum(0) - counts)[group]
        if window is not None:
            runs = group * (len(numbers) + 1) + place // window
            return Groups.of(runs)
        mask = group.new_zeros((len(counts), int(counts.max()) if len(counts) else 0)).bool()
        mask[group, place] = True
        return Groups(group, place, mask)

    def pad(self, rows: Tensor) -> Tensor:
        """[M, ...] to [G, L, ...], zeros where there is no row."""
        padded = rows.new_zeros(*self.mask.shape, *rows.shape[1:])
        return padded.index_put((self.group, self.place), rows)

    def pick(self, values: Tensor) -> Tensor:
        """[G, L] to [M], in the order of the rows."""
        return values[self.group, self.place]

    @property
    def pairs(self) -> Tensor:
        """[G, L, L], True for two different rows of a group."""
        both = self.mask[:, :, None] & self.mask[:, None, :]
        return both & ~torch.eye(self.mask.shape[1], dtype=torch.bool, device=both.device)

    @property
    def sizes(self) -> Tensor:
        """[G, 1], rows of each group."""
        return self.mask.sum(dim=1, keepdim=True)
