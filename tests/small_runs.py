"""Small caches made by the real stage one, and runs of students that learn from them."""

import json
from pathlib import Path
from typing import Any

from small_teachers import make_bert, make_llama, make_rows, save_teacher, write_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.cache import TeacherCache
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.train_student import StudentConfig

TINY = {"layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 24}


def make_data(root: Path) -> dict[str, Any]:
    """Rows in two files, for training and for testing."""
    rows = make_rows(30)
    train, test = write_rows(root / "train.jsonl", rows[:22]), root / "test.jsonl"
    write_rows(test, rows[22:])
    return {
        "source": "json",
        "files": {"train": str(train), "test": str(test)},
        "splits": {"train": "train", "test": "test"},
    }


def make_language_cache(root: Path, **changes: Any) -> Path:
    """A language model's cache with every class kept, exactly, of 32-token blocks."""
    save_teacher(root / "teacher", make_llama())
    return _make_cache(
        root,
        {
            "task": {"name": "causal-lm", "block_size": 32},
            "data": make_data(root),
            "hidden": {"layers": [0, -1], "dtype": "float32"},
            **changes,
        },
    )


def make_topic_cache(root: Path, **changes: Any) -> Path:
    """A classifier's cache with pooled vectors and the last layer, texts carried along."""
    save_teacher(root / "teacher", make_bert())
    return _make_cache(
        root,
        {
            "task": {"name": "sequence-classification", "max_length": 48},
            "data": {**make_data(root), "carry": ["text", "language"]},
            "hidden": {"layers": [-1], "pooled": True, "dtype": "float32"},
            **changes,
        },
    )


def _make_cache(root: Path, settings: dict[str, Any]) -> Path:
    config = {
        "output": str(root / "cache"),
        "teacher": {"model": str(root / "teacher")},
        "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
        "batch": {"tokens": 256},
        "shard": {"examples": 16},
        **settings,
    }
    return cache_teacher(CacheConfig.model_validate(config), progress=False)


def make_student_config(cache: Path, output: Path, **changes: Any) -> StudentConfig:
    """A llama of one layer, two steps an epoch, plain gradient descent on the CPU."""
    settings: dict[str, Any] = {
        "cache": str(cache),
        "output": str(output),
        "student": {"from": "scratch", "architecture": "llama", **TINY},
        "losses": [{"name": "forward_kl"}],
        **changes,
    }
    settings["training"] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "use_cpu": True,
        **changes.get("training", {}),
    }
    return StudentConfig.model_validate(settings)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def open_student(run: Path) -> PreTrainedModel:
    """The student of a finished run, as anybody opens it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run)
    return model


def count_tokens(cache: Path, split: str) -> int:
    """Input tokens of a split."""
    opened = TeacherCache.open(cache)
    return sum(len(opened[int(row)].input_ids) for row in opened.split_indices(split))
