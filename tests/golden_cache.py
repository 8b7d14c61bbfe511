"""Caches that were written once and must be read for ever: how they were made.

    python tests/golden_cache.py NAME      writes tests/golden/NAME, and what it holds beside it

A new codec, signal or column gets a new cache. One that stands is never written again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_examples import SIGNALS, make_draft, write_cache

from pipeline.cache import Draft, Signal, TargetsSpec, TeacherCache, VectorType
from pipeline.examples import CachedExample

GOLDEN = Path(__file__).parent / "golden"


def _kept_as(dtype: VectorType) -> dict[str, Signal]:
    return {name: signal.model_copy(update={"dtype": dtype}) for name, signal in SIGNALS.items()}


_PROJECTED = {
    "layer.-1": Signal(width=2, projection={"name": "pca", "width": 2}, source_width=6),
    "layer.0": Signal(
        width=3, dtype="int8", projection={"name": "random", "width": 3}, source_width=4
    ),
    "pooled": Signal(
        width=2,
        dtype="bfloat16",
        per="example",
        projection={"name": "pca", "width": 2},
        source_width=3,
    ),
}
_ATTENTION = {
    "query.2": Signal(width=6, dtype="float32", heads=3),
    "key.2": Signal(width=2, dtype="float16", heads=1),
    "value.2": Signal(width=2, dtype="int8", heads=1),
}
_KEPT_AND_DRAWN = {"top_k": 8, "tail_draws": 3, "temperatures": (1.0, 2.0)}
_FEW = {"top_k": 2, "codec": "steps"}
CASES: dict[str, dict[str, Any]] = {
    "steps": {"targets": {**_KEPT_AND_DRAWN, "codec": "steps"}, "signals": SIGNALS},
    "steps-cold": {"targets": {"top_k": 4, "temperatures": (0.5, 1.0, 4.0), "codec": "steps"}},
    "steps-fine": {
        "targets": {"top_k": 6, "codec": {"name": "steps", "levels": 400}},
        "num_classes": 1000,
    },
    "steps-draws": {"targets": {"top_k": 0, "tail_draws": 12, "codec": "steps"}},
    "steps-large": {
        "targets": {"top_k": 5, "tail_draws": 2, "codec": "steps"},
        "num_classes": 70_000,
        "num_examples": 3,
    },
    "steps-lz4": {
        "targets": {"top_k": 5, "tail_draws": 2, "codec": "steps", "compression": "lz4"},
        "num_classes": 300,
    },
    "steps-plain": {
        "targets": {"top_k": 5, "tail_draws": 2, "codec": "steps", "compression": "none"},
        "num_classes": 300,
    },
    "lossless": {
        "targets": {**_KEPT_AND_DRAWN, "codec": "lossless"},
        "signals": _kept_as("float16"),
    },
    "lossless-all": {"targets": {"top_k": 50, "codec": "lossless"}},
    "lossless-large": {
        "targets": {"top_k": 5, "tail_draws": 2, "codec": "lossless"},
        "num_classes": 70_000,
        "num_examples": 3,
    },
    "hidden-bfloat16": {"targets": _FEW, "signals": _kept_as("bfloat16")},
    "hidden-float8": {"targets": _FEW, "signals": _kept_as("float8_e4m3fn")},
    "hidden-int8": {"targets": _FEW, "signals": _kept_as("int8")},
    "hidden-projected": {"targets": _FEW, "signals": _PROJECTED, "positions": {"every": 2}},
    "hidden-attention": {"targets": _FEW, "signals": _ATTENTION},
}


def make_golden_draft(name: str) -> Draft:
    """The draft of a case."""
    changes = dict(CASES[name])
    changes["targets"] = TargetsSpec.model_validate(changes["targets"])
    return make_draft(changes.pop("num_examples", 6), **changes)


def describe_example(example: CachedExample) -> dict[str, Any]:
    """Everything an example holds, as JSON; a float32 is a float64 of the same value."""
    targets = example.targets
    tensors = ("ids", "logits", "draw_ids", "draw_logits", "logsumexp", "label_log_probs")
    arrays = ("input_ids", "segment_lengths", "target_positions", "label_ids")
    return {
        "example_id": example.example_id,
        "columns": dict(example.columns),
        **{name: np.asarray(getattr(example, name)).tolist() for name in arrays},
        **{name: getattr(targets, name).tolist() for name in tensors},
        "temperatures": list(targets.temperatures),
        "num_classes": targets.num_classes,
        "hidden": {
            name: example.hidden[name].to(torch.float32).tolist() for name in example.hidden
        },
    }


def write_golden(name: str) -> None:
    """Write a case, and what is read from it."""
    folder = GOLDEN / name
    if folder.exists():
        raise SystemExit(f"{folder}: stands already and must not change")
    write_cache(folder, make_golden_draft(name))
    cache = TeacherCache.open(folder)
    content = [describe_example(cache[row]) for row in range(len(cache))]
    (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=None) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CASES:
        write_golden(chosen)
