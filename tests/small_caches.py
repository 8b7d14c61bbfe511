"""Caches of a few examples with known distributions, written by the real writer."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pipeline.cache import CacheWriter, Draft, Identity, TargetsSpec
from pipeline.cache.codecs import Lossless
from pipeline.examples import CachedExample
from pipeline.identity import digest_tokenizer
from pipeline.safe_loading import open_tokenizer
from pipeline.targets import UNLABELLED, Targets

WORDS = ["<s>", "return", "def", " x", "\n", "\x1b[31m", "שלום", "…"]


def targets_of(logits: torch.Tensor, kept: int, labels: list[int]) -> Targets:
    top = logits.topk(kept)
    log_probs = logits.log_softmax(-1)
    label_ids = torch.tensor(labels)
    known = label_ids != UNLABELLED
    said = log_probs.gather(1, label_ids.clamp(min=0)[:, None])[:, 0]
    empty = torch.zeros(len(logits), 0)
    return Targets(
        ids=top.indices,
        logits=top.values,
        draw_ids=empty.long(),
        draw_logits=empty,
        logsumexp=logits.logsumexp(-1, keepdim=True),
        label_ids=label_ids,
        label_log_probs=torch.where(known, said, 0.0),
        temperatures=(1.0,),
        num_classes=logits.shape[1],
    )


def write_cache(
    path: Path,
    examples: list[CachedExample],
    *,
    shifted: bool,
    label_names: list[str] | None = None,
) -> Path:
    targets = examples[0].targets
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    (path / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    (path / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8"
    )
    known = {"digest": digest_tokenizer(open_tokenizer(path / "tokenizer"))}
    identity = {"digest": "0123456789abcdef0123456789abcdef"}
    draft = Draft(
        identity=Identity(
            data={**identity, "source": "a-source"},
            preprocessing=identity,
            tokenizer=known,
            teacher={**identity, "name": "a-teacher"},
        ),
        task={"name": "causal-lm" if shifted else "sequence-classification"},
        targets=TargetsSpec(top_k=targets.ids.shape[1], codec=Lossless()),
        num_classes=targets.num_classes,
        shifted=shifted,
        label_names=label_names,
        columns={"language": "string"},
        shard_examples=256,
        num_examples=len(examples),
    )
    writer = CacheWriter(path, draft)
    for index in range(draft.num_shards):
        with writer.shard(index) as shard:
            for example in examples[index * 256 : (index + 1) * 256]:
                shard.add(example)
    writer.finish()
    return path


def language_example(name: str, ids: list[int], logits: torch.Tensor, kept: int) -> CachedExample:
    return CachedExample(
        example_id=name,
        input_ids=np.array(ids, dtype=np.int32),
        segment_lengths=np.array([len(ids)], dtype=np.int32),
        target_positions=np.arange(len(ids) - 1, dtype=np.int32),
        label_ids=np.array(ids[1:], dtype=np.int32),
        columns={"language": "en"},
        targets=targets_of(logits, kept, ids[1:]),
    )


def class_example(name: str, logits: torch.Tensor, label: int) -> CachedExample:
    return CachedExample(
        example_id=name,
        input_ids=np.array([0, 1, 3], dtype=np.int32),
        segment_lengths=np.array([3], dtype=np.int32),
        target_positions=np.zeros(1, dtype=np.int32),
        label_ids=np.array([label], dtype=np.int32),
        columns={"language": "yor"},
        targets=targets_of(logits, logits.shape[1], [label]),
    )
