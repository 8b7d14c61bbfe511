"""Logits over a vocabulary that no teacher at hand has: synthetic, but built like a real one.

    an id's rank of frequency -- Zipf's law --> prior     a text's topic x the id's place --> bend

What is set by hand follows a language model of 131,072 byte-level BPE classes that was trained for
ten minutes: ids near their rank of frequency, rare ids bent less, the sharpness of a position drawn
for each. That one's highest probability is 0.28 on average; these have 0.45, as better models do.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CLASSES = 131_072
_WIDTH = 48
_CLUSTERS = 2048
_ROWS = 128  # positions at a time: 64 MiB


def synthesize_logits(positions: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield [rows, CLASSES] float32 logits of neighbouring positions until there are as many."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    order = torch.arange(1, CLASSES + 1, dtype=torch.float32).log() + draw(CLASSES)
    rank = order.argsort().argsort().float()
    centres = draw(_CLUSTERS, _WIDTH)
    members = torch.randint(0, _CLUSTERS, (CLASSES,), generator=generator)
    classes = (centres[members] + 0.5 * draw(CLASSES, _WIDTH)) / _WIDTH**0.5
    classes *= (1 + rank / 3000)[:, None] ** -0.5
    topic = draw(1, _WIDTH)
    for start in range(0, positions, _ROWS):
        bends = []
        for _ in range(min(_ROWS, positions - start)):
            topic = 0.7 * topic + 0.51**0.5 * draw(1, _WIDTH)
            bends.append(3.7 * (0.35 * draw(1)).exp() * topic)
        yield torch.cat(bends) @ classes.T - (rank + 5).log()
