"""What a writer accepts: an example that fits the draft and itself, of finite numbers.

CachedExample, Draft -- check_example --> nothing, or DataError, NumericalError naming the id
"""

from typing import Any

import numpy as np
import torch

from pipeline.cache.manifest import Draft
from pipeline.cache.signals.quantization import ENCODINGS
from pipeline.errors import DataError, NumericalError
from pipeline.examples import CachedExample
from pipeline.positions import pick_positions
from pipeline.targets import UNLABELLED

_FINITE = ("logits", "draw_logits", "logsumexp", "label_log_probs")


def check_example(example: CachedExample, draft: Draft) -> None:
    """Refuse an example that does not fit the draft or itself.

    Raises:
        DataError: a count, shape, id or column that does not fit.
        NumericalError: NaN or infinity.
    """
    subject = f"example {example.example_id!r}"
    for what, found, expected in _facts(example, draft):
        if found != expected:
            raise DataError(f"{subject}: {what} is {found}, expected {expected}; mend the capture")
    targets = example.targets
    for name in _FINITE:
        values = getattr(targets, name)
        if name == "logits" and draft.imported is not None and draft.targets.codec.short:
            values = torch.where(values == -torch.inf, 0.0, values)
        if not torch.isfinite(values).all():
            raise NumericalError(
                f"{subject}: the teacher's {name} hold NaN or infinity;"
                " try another dtype for the teacher"
            )
    for name, ids in (("ids", targets.ids), ("draw_ids", targets.draw_ids)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < draft.num_classes:
            raise DataError(f"{subject}: {name} outside [0, {draft.num_classes}); mend the capture")
    if not np.array_equal(targets.label_ids.numpy(), example.label_ids):
        raise DataError(f"{subject}: its targets have other label_ids than it has; mend the task")
    if draft.shifted and (found := find_shift(example)):
        raise DataError(f"{subject}: {found}; row t must be about token t + 1, mend the task")
    _check_hidden(example, draft, subject)


def find_shift(example: CachedExample) -> str | None:
    """Compare each label with the token after its position; say where they differ first."""
    labelled = np.flatnonzero(example.label_ids != UNLABELLED)
    after = example.target_positions[labelled] + 1
    if not len(after):
        return None
    if after.max() >= len(example.input_ids):
        return f"a target about position {int(after.max())} of {len(example.input_ids)} tokens"
    wrong = np.flatnonzero(example.input_ids[after] != example.label_ids[labelled])
    if not len(wrong):
        return None
    at, label = int(after[wrong[0]]), int(example.label_ids[labelled[wrong[0]]])
    return f"token {int(example.input_ids[at])} at position {at}, but its target is about {label}"


def count_features(example: CachedExample, draft: Draft) -> int:
    """M, the rows of its signals per feature; 0 where there are none."""
    names = [name for name, signal in draft.signals.items() if signal.per == "feature"]
    return len(example.hidden[names[0]]) if names else 0


def _facts(example: CachedExample, draft: Draft) -> list[tuple[str, Any, Any]]:
    targets, spec, layout = example.targets, draft.targets, draft.layout
    count, tokens = len(example.target_positions), len(example.input_ids)

    def shape(name: str) -> tuple[str, list[int], list[int]]:
        return f"the shape of targets.{name}", list(getattr(targets, name).shape), expected[name]

    expected = {
        "ids": [count, layout.top_k],
        "logits": [count, layout.top_k],
        "draw_ids": [count, layout.tail_draws],
        "draw_logits": [count, layout.tail_draws],
        "logsumexp": [count, len(spec.temperatures)],
        "label_log_probs": [count],
        "label_ids": [count],
    }
    return [
        ("the sum of segment_lengths", int(np.sum(example.segment_lengths)), tokens),
        ("the number of label_ids", len(example.label_ids), count),
        *map(shape, expected),
        ("targets.temperatures", targets.temperatures, spec.temperatures),
        ("targets.num_classes", targets.num_classes, draft.num_classes),
        ("the list of columns", sorted(example.columns), sorted(draft.columns)),
        ("the list of hidden signals", sorted(example.hidden), sorted(draft.signals)),
    ]


def _check_hidden(example: CachedExample, draft: Draft, subject: str) -> None:
    features = count_features(example, draft)
    whole = (example.target_positions, np.arange(len(example.input_ids)))
    allowed = {len(pick_positions(features, example, draft.positions)) for features in whole}
    for name, signal in draft.signals.items():
        found = list(example.hidden[name].shape)
        rows = 1 if signal.per == "example" else features
        if found != [rows, signal.given_width] or (signal.per == "feature" and rows not in allowed):
            counts = "1" if signal.per == "example" else " or ".join(map(str, sorted(allowed)))
            raise DataError(
                f"{subject}: hidden {name} has shape {found}, expected"
                f" [{counts}, {signal.given_width}] as every signal; mend the capture"
            )
        projected = signal.projection is not None  # then its dtype keeps other numbers
        limit = ENCODINGS["float32" if projected else signal.dtype].limit
        values = example.hidden[name].float()
        if values.numel() and not bool((values.abs() <= limit).all()):
            raise NumericalError(
                f"{subject}: hidden {name} holds NaN or numbers above the {limit:g} of"
                f" {signal.dtype}; try another hidden.dtype, or another dtype for the teacher"
            )
