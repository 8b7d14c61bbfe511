"""The fused head and its losses beside whole logits: time, memory, and whole training steps.

    random hidden states, weights and targets over V classes -- measure_losses --> time, memory
    a cache of such targets, a small student -- measure_vocabularies --> steps of both trainers

Everything here is made up: what it costs does not depend on what the numbers say.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from pipeline.batches import Collator, Selection
from pipeline.cache import CacheWriter, Draft, Identity, TargetsSpec, TeacherCache
from pipeline.examples import CachedExample
from pipeline.heads import OutputHead
from pipeline.losses import Knowledge
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.fused import FusedHead
from pipeline.losses.labels import CrossEntropy
from pipeline.student import FromScratch, build_student
from pipeline.targets import Targets
from pipeline.terms import attach_projections
from pipeline.trainer import DistillationTrainer
from stages.bench.baselines import LabelledBlocks
from stages.bench.measuring import Row, finish_device_work, interleave, stopwatch, time_row
from stages.bench.setting import Setting
from stages.bench.speed import bench_arguments, seconds_per_step

LOSSES = (ForwardKL(weight=0.9), CrossEntropy(weight=0.1))
KEPT = 64
_PLAIN = "cross-entropy over whole logits, forward and backward"
_DENSE = "KL over a whole log-softmax at the same classes + cross-entropy, forward and backward"
_STEP = "a cross-entropy step of transformers.Trainer, same student and inputs, data in memory"


def measure_losses(setting: Setting) -> list[Row]:
    """Forward and backward of the head and KL + CE for each vocabulary; memory for the last."""
    config, rows = setting.config, []
    for classes in config.vocabularies:
        case = _Case(classes, config.loss_positions, config.loss_width)
        sides = {"fused": case.fused, "plain": case.plain, "dense": case.dense}
        label = f"V = {classes:,}, width {config.loss_width}"
        found = interleave(
            {name: partial(stopwatch, run) for name, run in sides.items()}, config.loss_runs
        )
        what = f"fused head, KL + CE, k = {KEPT}, {label}"
        large = classes == max(config.vocabularies)
        for side, against, goal in (("plain", _PLAIN, "≤ 0.85"), ("dense", _DENSE, "≤ 0.60")):
            row = time_row(what, "ms", 1e3, found["fused"], against, found[side])
            rows.append(replace(row, goal=goal if large else ""))
    extra = _measure_memory(classes, config.loss_positions, config.loss_width)
    if extra is not None:
        size = 4e-6 * classes * config.loss_positions
        against = "the float32 tensor of all logits, computed"
        what = f"memory of the fused loss, {label}"
        rows.append(Row(what, "MB", extra / 1e6, size, against, goal="≤ 0.125"))
    return rows


def measure_vocabularies(setting: Setting) -> list[Row]:
    """Whole steps from a cache against plain ones, for a student of each vocabulary."""
    rows = []
    for classes in setting.config.vocabularies:
        cache = _make_cache(setting, classes)

        build = partial(_build_student, setting, classes)
        size = sum(p.numel() for p in build().parameters())
        found = interleave(
            {
                "cached": partial(_time_cached, setting, cache, build),
                "plain": partial(_time_plain, setting, cache, build),
            },
            setting.config.loss_runs,
        )
        what = f"step from the cache, V = {classes:,}, {size / 1e6:.1f} M parameters"
        steps = found["cached"], _STEP, found["plain"]
        rows.append(time_row(what, "ms/step", 1e3, *steps, goal="≤ 1.00"))
    return rows


class _Case:
    """One head, hidden states, targets and labels; the same for every side."""

    def __init__(self, classes: int, positions: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.targets = make_targets(positions, classes, generator)
        self.weight = torch.randn(classes, width, generator=generator).div_(width**0.5)
        self.hidden = torch.randn(positions, width, generator=generator)
        self.weight.requires_grad_()
        self.hidden.requires_grad_()
        self._head = self._fuse()

    def _fuse(self) -> FusedHead:
        return FusedHead(OutputHead(self.weight, None, 1.0, None, len(self.weight)))

    def fused(self) -> None:
        """Ours: KL + CE in chunks."""
        self.clear()
        knowledge = Knowledge(self.targets, self.targets.label_ids)
        factors = [torch.tensor(loss.weight_at(0.0) / len(self.hidden)) for loss in LOSSES]
        total, _ = self._head.sum_terms(LOSSES, self.hidden, knowledge, factors)
        _backward(total)

    def plain(self) -> None:
        """Cross-entropy alone."""
        self.clear()
        _backward(cross_entropy(self._logits(), self.targets.label_ids))

    def dense(self) -> None:
        """KL at the kept classes by a log-softmax over all, and cross-entropy."""
        self.clear()
        logits = self._logits()
        teacher = self.targets.at(1.0)
        own = logits.log_softmax(dim=1).gather(1, self.targets.ids)
        divergence = (teacher.log_probs.exp() * (teacher.log_probs - own)).sum(dim=1).mean()
        _backward(0.9 * divergence + 0.1 * cross_entropy(logits, self.targets.label_ids))

    def clear(self) -> None:
        """Forget the gradients, as an optimizer does between steps."""
        self.weight.grad = self.hidden.grad = None

    def _logits(self) -> Tensor:
        return self.hidden @ self.weight.t()


def _measure_memory(classes: int, positions: int, width: int) -> int | None:
    """Bytes at the peak of a fused call above hidden states, weights and their gradients, if any.

    In a process of its own, where no memory of earlier work is left to be used again.
    """
    with get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_run_once, (classes, positions, width))
    extra = (peak or 0) - 4 * width * (classes + positions)
    return extra if extra > 0 else None


def _run_once(classes: int, positions: int, width: int) -> int | None:
    _Case(KEPT, 1, width).fused()  # whatever the first call of its kind loads
    return measure_peak(_Case(classes, positions, width).fused)


def measure_peak(run: Callable[[], None]) -> int | None:
    """Bytes of resident memory at the peak of a run above those before; None where not told."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5", encoding="ascii")
        before = _read_kilobytes(status, "VmRSS")
        run()
        finish_device_work()
        return 1024 * (_read_kilobytes(status, "VmHWM") - before)
    except OSError:
        return None


def make_targets(positions: int, classes: int, generator: torch.Generator) -> Targets:
    """Random targets of KEPT classes with nine tenths of the mass, and random labels."""
    step = classes // KEPT
    ids = torch.arange(KEPT) * step + torch.randint(0, step, (positions, KEPT), generator=generator)
    logits = torch.randn(positions, KEPT, generator=generator) * 2
    labels = torch.randint(0, classes, (positions,), generator=generator)
    nothing = torch.zeros(positions, 0)
    return Targets(
        ids=ids,
        logits=logits,
        draw_ids=nothing.long(),
        draw_logits=nothing,
        logsumexp=torch.logsumexp(logits, dim=1, keepdim=True) + 0.1,
        label_ids=labels,
        label_log_probs=torch.full((positions,), -5.0),
        temperatures=(1.0,),
        num_classes=classes,
    )


def _build_student(setting: Setting, classes: int) -> Any:
    width = 256 if classes < 10_000 else 128
    origin = FromScratch(
        architecture="llama",
        layers=2,
        hidden_size=width,
        heads=4,
        intermediate_size=2 * width,
        settings={
            "max_position_embeddings": setting.config.block_size,
            "tie_word_embeddings": True,
        },
    )
    return build_student(origin, setting.task, classes, setting.tokenizer, seed=0)


def _time_cached(setting: Setting, cache: TeacherCache, build: Callable[[], Any]) -> float:
    student = build()
    attach_projections(student, LOSSES, {})
    collator = Collator(setting.task, 0)
    arguments = bench_arguments(setting, setting.config.vocabulary_batch)
    opened = TeacherCache.open(cache.path)
    return seconds_per_step(
        DistillationTrainer(student, LOSSES, Selection(opened), collator, arguments)
    )


def _time_plain(setting: Setting, cache: TeacherCache, build: Callable[[], Any]) -> float:
    student = build()
    blocks = LabelledBlocks([cache[row] for row in range(len(cache))], setting.task)
    arguments = bench_arguments(setting, setting.config.vocabulary_batch)
    return seconds_per_step(Trainer(model=student, args=arguments, train_dataset=blocks))


def _make_cache(setting: Setting, classes: int) -> TeacherCache:
    """Random tokens and targets, as many as the steps read."""
    config, path = setting.config, setting.folder / "vocabulary"
    shutil.rmtree(path, ignore_errors=True)
    count = config.vocabulary_batch * config.vocabulary_steps
    nobody: dict[str, Any] = {"digest": "synthetic"}
    draft = Draft(
        identity=Identity(data=nobody, preprocessing=nobody, tokenizer=nobody, teacher=nobody),
        task=setting.task.model_dump(mode="json"),
        targets=TargetsSpec(top_k=KEPT),
        num_classes=classes,
        shifted=True,
        shard_examples=count,
        num_examples=count,
    )
    writer = CacheWriter(path, draft)
    generator = torch.Generator().manual_seed(0)
    with writer.shard(0) as shard:
        for row in range(count):
            shard.add(_make_example(row, config.block_size, classes, generator))
    writer.finish()
    return TeacherCache.open(path)


def _make_example(row: int, size: int, classes: int, generator: torch.Generator) -> CachedExample:
    targets = make_targets(size - 1, classes, generator)
    labels = targets.label_ids.numpy().astype(np.int32)
    return CachedExample(
        example_id=str(row),
        input_ids=np.concatenate([[0], labels]).astype(np.int32),
        segment_lengths=np.array([size], dtype=np.int32),
        target_positions=np.arange(size - 1, dtype=np.int32),
        label_ids=labels,
        columns={},
        targets=targets,
        hidden={},
    )


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _read_kilobytes(status: Path, name: str) -> int:
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{status}: tells no {name}")
