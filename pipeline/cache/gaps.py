"""Examples that the teacher could not answer: a row without targets, and a word on why.

Example -- hollow --> CachedExample with N = 0, M = 0 -- ShardWriter.skip --> shard.json: skipped
"""

from dataclasses import fields, replace

import numpy as np
import torch

from pipeline.cache.manifest import Draft
from pipeline.errors import DataError
from pipeline.examples import CachedExample, Example
from pipeline.targets import Targets

MOST_SKIPPED = 10_000


def allow_skips(num_examples: int) -> int:
    """How many may be skipped: one in a hundred, at least one; then the teacher is broken."""
    return min(MOST_SKIPPED, max(1, num_examples // 100))


def require_few(skipped: int, num_examples: int, example_id: str, reason: str) -> None:
    """Stop where so many are skipped that the fault is not theirs.

    Raises:
        DataError: more than `allow_skips`; names one of them.
    """
    if skipped > (most := allow_skips(num_examples)):
        raise DataError(
            f"{skipped:,} of {num_examples:,} examples would be skipped, at most {most:,} may be;"
            f" {example_id!r}: {reason}; mend the teacher or the data and cache into another output"
        )


def hollow(example: Example, draft: Draft) -> CachedExample:
    """The example with nothing asked and nothing answered; a vector per example is zeros."""
    layout = draft.layout
    targets = Targets(
        ids=torch.zeros(0, layout.top_k, dtype=torch.int64),
        logits=torch.zeros(0, layout.top_k),
        draw_ids=torch.zeros(0, layout.tail_draws, dtype=torch.int64),
        draw_logits=torch.zeros(0, layout.tail_draws),
        logsumexp=torch.zeros(0, len(layout.temperatures)),
        label_ids=torch.zeros(0, dtype=torch.int64),
        label_log_probs=torch.zeros(0),
        temperatures=layout.temperatures,
        num_classes=layout.num_classes,
    )
    hidden = {
        name: torch.zeros(int(signal.per == "example"), signal.given_width)
        for name, signal in draft.signals.items()
    }
    own = {field.name: getattr(unasked(example), field.name) for field in fields(Example)}
    return CachedExample(**own, targets=targets, hidden=hidden)


def unasked(example: Example) -> Example:
    """The example with nothing asked, as a cache holds one that was skipped."""
    none = np.zeros(0, dtype=np.int32)
    return replace(example, target_positions=none, label_ids=none)
