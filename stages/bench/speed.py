"""Time: stage one against the bare teacher, student steps with and without a cache.

    measure_capture   caching ÷ forward pass          measure_training   cached, plain, live steps

Steps are timed over one epoch of the text from a freshly opened cache: reading, decompressing and
collating are in them, the building of the model is not.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.batches import Selection
from pipeline.capture import plan_batches
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.labels import CrossEntropy
from pipeline.reading import open_reading
from pipeline.student import build_student
from pipeline.terms import attach_projections
from pipeline.trainer import DistillationTrainer
from stages.bench.baselines import LabelledBlocks, LiveTrainer, forward_all
from stages.bench.measuring import Row, Seconds, finish_device_work, interleave, rate_row, time_row
from stages.bench.setting import Setting

LOSSES = (ForwardKL(weight=0.9), CrossEntropy(weight=0.1))
STUDENTS = (1, 5)
HIDDEN_LAYERS = (1, -1)


def measure_capture(setting: Setting) -> list[Row]:
    """Stage one against the bare forward pass of the same model on the same batches.

    The first row is that without hidden states; it leaves the caches `plain` and `hidden`.
    """
    config = setting.config
    batches = _plan_like_capture(setting)
    found = interleave(
        {
            "forward": lambda: forward_all(setting.model, batches),
            "plain": lambda: setting.capture("plain", config.targets),
            "hidden": lambda: setting.capture("hidden", config.targets, HIDDEN_LAYERS),
        },
        config.captures,
    )
    against = "bare forward pass, same model and batches: model(**inputs), nothing kept"
    kept = (
        f"top {config.top_k} + {config.tail_draws} draws, {len(config.temperatures)} temperatures"
    )
    return [
        rate_row(f"capture: {what}", setting.tokens, found[name], against, found["forward"], goal)
        for name, what, goal in (
            ("plain", kept, "≥ 0.95"),
            ("hidden", f"{kept}, {len(HIDDEN_LAYERS)} hidden layers", "≥ 0.90"),
        )
    ]


def measure_training(setting: Setting, capture_rate: float) -> list[Row]:
    """A step from the cache against a plain one, and whole jobs against the live teacher's.

    Args:
        capture_rate: tokens per second of the capture that such a job begins with.
    """
    found = interleave(
        {
            "cached": lambda: _time_steps(setting, _cached_trainer),
            "plain": lambda: _time_steps(setting, _plain_trainer),
            "live": lambda: _time_steps(setting, _live_trainer),
        },
        setting.config.epochs,
    )
    live = "a step with the teacher's forward pass in it: dense KL + cross-entropy"
    return [
        time_row(
            "student step from the cache",
            "ms/step",
            1e3,
            found["cached"],
            "a cross-entropy step of transformers.Trainer, same model and inputs, data in memory",
            found["plain"],
        ),
        time_row(
            "student step from the cache", "ms/step", 1e3, found["cached"], live, found["live"]
        ),
        *project_jobs(
            setting.transfer_tokens,
            setting.config.training_steps,
            capture_rate,
            found["cached"],
            found["live"],
        ),
    ]


def project_jobs(
    tokens: int, steps: int, capture_rate: float, cached: Seconds, live: Seconds
) -> list[Row]:
    """Whole jobs, computed from the seconds of a step and the tokens per second of the capture.

    The last row, the steps after which the capture is paid for, is left out where none are.
    """
    capture = tokens / capture_rate
    ours, theirs = (steps * median(step) for step in (cached, live))
    rows = [
        Row(
            what=f"{count} student{'s' if count > 1 else ''} of {steps:,} steps",
            unit="s",
            measured=capture + count * ours,
            baseline=count * theirs,
            against=f"computed from the times above: {tokens:,} tokens captured once, then the"
            " steps; against the same students with the live teacher",
        )
        for count in STUDENTS
    ]
    saved = (theirs - ours) / steps
    if saved > 0:
        rows.append(Row("steps that pay for the capture", "steps", capture / saved))
    return rows


class _Clock(TrainerCallback):  # type: ignore[misc]
    """When the epoch began and each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish_device_work()
        self.times = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish_device_work()
        self.times.append(time.perf_counter())


def bench_arguments(setting: Setting, batch_size: int) -> Any:
    """One epoch of a constant batch size, nothing logged or saved."""
    settings = {
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    return training_arguments(settings, EvaluationConfig(), setting.folder / "run")


def seconds_per_step(trainer: Trainer) -> float:
    """Train to the end; the mean over all steps but the first, which sets up buffers and hooks.

    A step's time includes that of its data. Of a single step, its own.
    """
    clock = _Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    times = clock.times[1:] if len(clock.times) > 2 else clock.times
    return (times[-1] - times[0]) / (len(times) - 1)


def _time_steps(setting: Setting, make: Callable[[Setting, Any, Any], Trainer]) -> float:
    """Seconds per step of a new student over one epoch of whole batches."""
    classes = setting.task.num_classes(setting.tokenizer)
    student = build_student(
        setting.config.student, setting.task, classes, setting.tokenizer, seed=0
    )
    arguments = bench_arguments(setting, setting.config.batch_size)
    return seconds_per_step(make(setting, student, arguments))


def _cached_trainer(setting: Setting, student: Any, arguments: Any) -> Trainer:
    reading = open_reading(setting.open("plain"), None, None, "the student")
    attach_projections(student, LOSSES, {})
    examples = Selection(reading.cache, _whole_batches(setting))
    return DistillationTrainer(student, LOSSES, examples, reading.collator(LOSSES), arguments)


def _plain_trainer(setting: Setting, student: Any, arguments: Any) -> Trainer:
    return Trainer(model=student, args=arguments, train_dataset=_labelled_blocks(setting))


def _live_trainer(setting: Setting, student: Any, arguments: Any) -> Trainer:
    teacher = setting.model.to(arguments.device)
    blocks = _labelled_blocks(setting)
    return LiveTrainer(teacher, model=student, args=arguments, train_dataset=blocks)


def _labelled_blocks(setting: Setting) -> LabelledBlocks:
    rows = _whole_batches(setting)
    return LabelledBlocks([setting.examples[row] for row in rows], setting.task)


def _whole_batches(setting: Setting) -> list[int]:
    """Rows of full blocks, as many as fill whole batches: every step of every side is alike."""
    size = setting.config.block_size
    full = [row for row, one in enumerate(setting.examples) if len(one.input_ids) == size]
    return full[: len(full) // setting.config.batch_size * setting.config.batch_size]


def _plan_like_capture(setting: Setting) -> list[dict[str, Any]]:
    """The batches of a capture: planned within each shard."""
    size, pad_id = setting.shard_examples, setting.tokenizer.pad_token_id or 0
    batches = []
    for start in range(0, len(setting.examples), size):
        shard = setting.examples[start : start + size]
        plan = plan_batches([len(one.input_ids) for one in shard], setting.config.batch_tokens)
        batches += [setting.task.batch([shard[row] for row in rows], pad_id) for rows in plan]
    return [batch.inputs for batch in batches]
