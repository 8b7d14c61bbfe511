"""Small teachers made by hand: random logits over V classes, and caches written from them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache import CacheWriter, Draft, Identity, Manifest, Signal, TargetsSpec
from pipeline.examples import CachedExample
from pipeline.positions import pick_positions
from pipeline.targets import Targets

SIGNALS = {
    "layer.-1": Signal(width=6, dtype="float32", per="feature"),
    "layer.0": Signal(width=4, dtype="float16", per="feature"),
    "pooled": Signal(width=3, dtype="float32", per="example"),
}


def make_draft(num_examples: int, **changes: Any) -> Draft:
    """A draft of a language model's cache over 50 classes with 8 kept and 3 drawn."""
    parts = ("data", "preprocessing", "tokenizer", "teacher")
    settings: dict[str, Any] = {
        "identity": Identity(**{part: {"digest": f"{part}-digest"} for part in parts}),
        "task": {"name": "causal-lm"},
        "targets": TargetsSpec(top_k=8, tail_draws=3, temperatures=(1.0, 2.0), codec="lossless"),
        "num_classes": 50,
        "shifted": True,
        "signals": {},
        "columns": {"split": "string", "weight": "float64"},
        "shard_examples": 4,
        "num_examples": num_examples,
    }
    settings |= changes
    return Draft(**settings)


def make_targets(logits: np.ndarray, label_ids: np.ndarray, draft: Draft, seed: int) -> Targets:
    """What a capture keeps of [N, V] logits."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(logits.astype(np.float32))
    layout = draft.layout
    kept = z.topk(layout.top_k, dim=-1)
    tail = torch.softmax(z, dim=-1).scatter(1, kept.indices, 0.0).double().numpy()
    draws = np.zeros((len(z), layout.tail_draws), dtype=np.int64)
    for row in range(len(z) if layout.tail_draws else 0):
        weights = tail[row] / tail[row].sum()
        draws[row] = rng.choice(draft.num_classes, layout.tail_draws, p=weights)
    draw_ids = torch.from_numpy(draws)
    labels = torch.from_numpy(label_ids.astype(np.int64))
    log_probs = torch.log_softmax(z, dim=-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    temperatures = draft.targets.temperatures
    return Targets(
        ids=kept.indices,
        logits=kept.values,
        draw_ids=draw_ids,
        draw_logits=z.gather(1, draw_ids),
        logsumexp=torch.stack([(z / t).logsumexp(dim=-1) for t in temperatures], dim=1),
        label_ids=labels,
        label_log_probs=torch.where(labels >= 0, log_probs, 0.0),
        temperatures=temperatures,
        num_classes=draft.num_classes,
    )


def make_example(row: int, draft: Draft, tokens: int | None = None) -> CachedExample:
    """The example of a row: a pure function of row and draft."""
    rng = np.random.default_rng(row)
    tokens = int(rng.integers(2, 9)) if tokens is None else tokens
    input_ids = rng.integers(0, draft.num_classes, tokens).astype(np.int32)
    positions = np.arange(tokens - 1, dtype=np.int32)
    label_ids = input_ids[1:].copy()
    logits = rng.normal(0, 3, (tokens - 1, draft.num_classes))
    example = CachedExample(
        example_id=f"text-{row}",
        input_ids=input_ids,
        segment_lengths=np.array([tokens], dtype=np.int32),
        target_positions=positions,
        label_ids=label_ids,
        columns={"split": "test" if row % 3 == 2 else "train", "weight": row / 2},
        targets=make_targets(logits, label_ids, draft, row),
    )
    kept = pick_positions(np.arange(tokens), example, draft.positions)
    hidden = {}
    for name, signal in draft.signals.items():
        shape = (1 if signal.per == "example" else len(kept), signal.given_width)
        hidden[name] = _round(rng.normal(size=shape), signal)
    return replace(example, hidden=hidden)


def _round(values: np.ndarray, signal: Signal) -> torch.Tensor:
    """To numbers that come back as they are, if they are not projected or scaled."""
    if signal.dtype in ("float16", "float32"):
        values = values.astype(signal.dtype)
    rounded = torch.from_numpy(values.astype(np.float32))
    return rounded.bfloat16().float() if signal.dtype == "bfloat16" else rounded


def make_examples(draft: Draft) -> list[CachedExample]:
    """All examples of a draft."""
    return [make_example(row, draft) for row in range(draft.num_examples)]


def write_shards(
    writer: CacheWriter, examples: Sequence[CachedExample], shards: Iterable[int]
) -> None:
    """Write some shards of a cache."""
    size = writer.draft.shard_examples
    for index in shards:
        with writer.shard(index) as shard:
            for example in examples[index * size : (index + 1) * size]:
                shard.add(example)


def write_cache(
    path: Path, draft: Draft, examples: Sequence[CachedExample] | None = None
) -> Manifest:
    """Write a whole cache, continuing where one was begun."""
    writer = CacheWriter(path, draft)
    missing = sorted(set(range(draft.num_shards)) - writer.finished)
    write_shards(writer, make_examples(draft) if examples is None else examples, missing)
    return writer.finish()


def assert_same(found: CachedExample, expected: CachedExample) -> None:
    """Compare two examples: exact but for the order of ids within a target."""
    assert found.example_id == expected.example_id
    assert dict(found.columns) == dict(expected.columns)
    for name in ("input_ids", "segment_lengths", "target_positions", "label_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    ours, theirs = found.targets, expected.targets
    assert (ours.temperatures, ours.num_classes) == (theirs.temperatures, theirs.num_classes)
    for name in ("logsumexp", "label_ids", "label_log_probs"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for ids, logits in (("ids", "logits"), ("draw_ids", "draw_logits")):
        orders = [getattr(side, ids).argsort(dim=1, stable=True) for side in (ours, theirs)]
        for name in (ids, logits):
            sides = zip((ours, theirs), orders, strict=True)
            one, other = (getattr(side, name).gather(1, order) for side, order in sides)
            assert torch.equal(one, other), name
    assert set(found.hidden) == set(expected.hidden)
    for name, values in expected.hidden.items():
        assert torch.equal(found.hidden[name], values), name
