"""Caches of made-up content, for what depends on amounts alone: speed, bytes per token, opening.

ids: log-uniform over the classes, as frequencies of words are; log-probabilities: falling by an
exponential step from rank to rank. A few sequences are made and written again under other ids.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.cache import CacheWriter, Draft, Identity, Signal, TargetsSpec, TeacherCache
from pipeline.cache.index.splits import write_shards
from pipeline.cache.manifest import MANIFEST, Manifest, Totals
from pipeline.examples import CachedExample
from pipeline.runs import write_json
from pipeline.targets import Targets

CLASSES = 131_072
SEQUENCE = 1024
_DISTINCT = 8
_SHARD_EXAMPLES = 256
_FALL = 0.25  # nats from rank to rank, on average


def make_draft(examples: int, targets: TargetsSpec, width: int = 0) -> Draft:
    """The draft of a language model's cache, with one hidden layer where `width` is not 0."""
    part = {"digest": "made up"}
    return Draft(
        identity=Identity(data=part, preprocessing=part, tokenizer=part, teacher=part),
        task={"name": "causal-lm", "block_size": SEQUENCE},
        targets=targets.resolve(CLASSES),
        num_classes=CLASSES,
        shifted=True,
        signals={"layer.4": Signal(width=width)} if width else {},
        shard_examples=_SHARD_EXAMPLES,
        num_examples=examples,
    )


def write_made_up(path: Path, draft: Draft) -> TeacherCache:
    """Write a cache of sequences of 1,024 tokens."""
    some = [_make_example(seed, draft) for seed in range(min(_DISTINCT, draft.num_examples))]
    writer = CacheWriter(path, draft)
    for index in range(draft.num_shards):
        with writer.shard(index) as shard:
            first = index * draft.shard_examples
            for row in range(first, first + draft.shard_size(index)):
                shard.add(replace(some[row % len(some)], example_id=f"made-up-{row}"))
    writer.finish()
    return TeacherCache.open(path)


def write_manifest(path: Path, draft: Draft) -> None:
    """What opening reads of a cache, and the list of its shards; the shards are not there."""
    digests = (hashlib.sha256(b"%d" % index).hexdigest() for index in range(draft.num_shards))
    rows = draft.num_examples
    manifest = Manifest(
        **draft.model_dump(mode="json"),
        shards=write_shards(path, digests),
        totals=Totals(examples=rows, targets=rows, features=0, tokens=rows, bytes=rows),
    )
    write_json(path / MANIFEST, manifest.model_dump(mode="json"))


def _make_example(seed: int, draft: Draft) -> CachedExample:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CLASSES, SEQUENCE).astype(np.int32)
    count, layout = SEQUENCE - 1, draft.layout
    entries = layout.top_k + layout.tail_draws
    falls = rng.exponential(_FALL, (count, entries))
    log_probs = np.cumsum(-falls, axis=1).astype(np.float32) - 1.0
    ids = torch.from_numpy(_draw_distinct(rng, count, entries))
    logits = torch.from_numpy(log_probs)
    beyond = [np.log(np.exp(log_probs / t).sum(axis=1) * 1.1) for t in draft.targets.temperatures]
    labels = torch.from_numpy(tokens[1:].astype(np.int64))
    return CachedExample(
        example_id="",
        input_ids=tokens,
        segment_lengths=np.array([SEQUENCE], dtype=np.int32),
        target_positions=np.arange(count, dtype=np.int32),
        label_ids=tokens[1:],
        targets=Targets(
            ids=ids[:, : layout.top_k],
            logits=logits[:, : layout.top_k],
            draw_ids=ids[:, layout.top_k :],
            draw_logits=logits[:, layout.top_k :],
            logsumexp=torch.from_numpy(np.stack(beyond, axis=1).astype(np.float32)),
            label_ids=labels,
            label_log_probs=torch.from_numpy(-rng.exponential(2.0, count).astype(np.float32)),
            temperatures=draft.targets.temperatures,
            num_classes=CLASSES,
        ),
        hidden={
            name: torch.from_numpy(rng.normal(size=(count, signal.width)).astype(np.float32))
            for name, signal in draft.signals.items()
        },
    )


def _draw_distinct(rng: np.random.Generator, count: int, entries: int) -> np.ndarray:
    """[count, entries] int64, in random order."""
    ids = np.exp(rng.random((count, entries)) * np.log(CLASSES)).astype(np.int64) - 1
    while True:
        ids.sort(axis=1)
        twice = np.zeros_like(ids, dtype=bool)
        twice[:, 1:] = ids[:, 1:] == ids[:, :-1]
        if not twice.any():
            return rng.permuted(ids, axis=1)
        ids[twice] = rng.integers(0, CLASSES, int(twice.sum()))
