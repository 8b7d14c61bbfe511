"""What the teacher said, bit for bit.

    ids -- differences --> byte planes          logits, float32 -- bits --> four byte planes

Numbers of a float16 or bfloat16 teacher end in zeros as float32; whole planes of them, or most of
their bits, cost nothing after zstd, so there is no choice of a dtype.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch

from pipeline.cache.codecs.base import (
    Array,
    Codec,
    Columns,
    Decoded,
    Entries,
    Find,
    Layout,
    are_finite,
)
from pipeline.cache.codecs.planes import (
    count_planes,
    join_ids,
    join_planes,
    name_planes,
    sort_ids,
    split_planes,
    split_ranks,
)

_FLOAT_BYTES = 4


class Lossless(Codec):
    """Raw logits and normalisers as float32, exact for any teacher."""

    short: ClassVar = True
    exact: ClassVar = True

    name: Literal["lossless"] = "lossless"

    def columns(self, layout: Layout) -> dict[str, tuple[str, int]]:
        """Planes of gaps and logits, then the normalisers as they are."""
        planes = count_planes(layout.num_classes - 1)
        kinds: dict[str, tuple[str, int]] = {}
        for prefix, width in (("", layout.top_k), ("draw_", layout.tail_draws)):
            if width:
                kinds |= name_planes(f"{prefix}gap", planes, width)
                kinds |= name_planes(f"{prefix}logit", _FLOAT_BYTES, width)
        kinds["logsumexp"] = ("float32", len(layout.temperatures))
        kinds["label_log_prob"] = ("float32", 1)
        return kinds

    def encode(self, entries: Entries, layout: Layout) -> Columns:
        """Sort by rank, split into bytes."""
        columns: Columns = {
            "logsumexp": entries.logsumexp,
            "label_log_prob": entries.label_log_probs[:, None],
        }
        parts = (
            ("", entries.ids, entries.logits),
            ("draw_", entries.draw_ids, entries.draw_logits),
        )
        for prefix, unordered, unordered_logits in parts:
            if unordered.shape[1]:
                ranks, _, logits = sort_ids(unordered, unordered_logits, layout)
                columns |= split_ranks(ranks, layout, f"{prefix}gap")
                bits = logits.astype(np.float32).view(np.uint32)
                columns |= split_planes(bits, f"{prefix}logit", _FLOAT_BYTES)
        return columns

    def decode(
        self, columns: Mapping[str, Array], layout: Layout, find: Find, out: Decoded
    ) -> None:
        """Put the bytes together again."""
        parts = (("", out.ids, out.logits), ("draw_", out.draw_ids, out.draw_logits))
        for prefix, ids, logits in parts:
            if ids.shape[1]:
                join_ids(columns, layout, f"{prefix}gap", find, ids)
                whole = np.int32 if isinstance(logits, np.ndarray) else torch.int32
                join_planes(columns, f"{prefix}logit", _FLOAT_BYTES, logits.view(whole))
        out.logsumexp[...] = columns["logsumexp"]
        out.label_log_probs[...] = columns["label_log_prob"][:, 0]

    def has_invalid(self, columns: Mapping[str, np.ndarray], padded: bool) -> bool:
        """See `Codec.has_invalid`: of logits the highest plane is looked at, a byte of four."""
        if not all(are_finite(columns[name]) for name in ("logsumexp", "label_log_prob")):
            return True
        for prefix in ("", "draw_"):
            highest = columns.get(f"{prefix}logit_3")
            doubtful = highest is not None and (highest & 0x7F).max(initial=0) == 0x7F
            if doubtful and _find_infinite(columns, prefix, padded and not prefix).any():
                return True
        return False


def _find_infinite(columns: Mapping[str, np.ndarray], prefix: str, padded: bool) -> np.ndarray:
    """[N, W] bool, where the bytes of a float32 are NaN or infinity; of -inf only unless padded."""
    low, middle, high, highest = (columns[f"{prefix}logit_{plane}"] for plane in range(4))
    found: np.ndarray = (highest & 0x7F == 0x7F) & (high >= 0x80)
    if padded:
        found &= (highest != 0xFF) | (high != 0x80) | (low | middle != 0)
    return found
