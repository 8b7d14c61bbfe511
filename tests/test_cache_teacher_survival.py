"""An interrupted capture loses only the shard under way, and never reports success."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_teachers import (
    make_config,
    make_llama,
    make_rows,
    make_tokenizer,
    read_files,
    save_teacher,
    write_rows,
)

from pipeline.cache import TeacherCache
from pipeline.errors import (
    CacheError,
    NumericalError,
)
from pipeline.teacher import Background
from stages.cache_teacher import CacheConfig, cache_teacher

COUNT = 20


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), make_llama())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(COUNT))


def run(config: CacheConfig) -> TeacherCache:
    return TeacherCache.open(cache_teacher(config, progress=False))


def test_a_disk_that_is_full_stops_the_stage_and_costs_only_the_shard_under_way(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    targets = {"top_k": "all", "codec": "lossless"}
    rows = make_rows(COUNT)
    rows[3]["text"] = rows[3]["text"] * 30  # several blocks, so that a later shard is the largest
    short = [{**row, "text": row["text"][:30]} for row in rows[:3]]
    file = write_rows(tmp_path / "rows.jsonl", [*short, *rows[3:]])
    task = {"name": "causal-lm", "block_size": 32, "packing": False}
    whole = make_config(
        tmp_path / "whole", teacher, file, targets=targets, task=task, shard={"examples": 3}
    )
    cache_teacher(whole, progress=False)
    sizes = [f.stat().st_size for f in sorted(whole.output.glob("shards/*/rows.arrow"))]
    assert sizes[0] < sizes[1]
    config = whole.model_copy(update={"output": tmp_path / "cache"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((sizes[0] + sizes[1]) // 2, hard))
    try:
        with pytest.raises(CacheError, match=r"cannot be written .* 1 of .* shards are safe"):
            cache_teacher(config, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(CacheError, match="not finished"):
        TeacherCache.open(config.output)
    cache_teacher(config, progress=False)
    assert read_files(config.output) == read_files(whole.output)
    sessions = json.loads((config.output / "capture.json").read_text())["sessions"]
    assert [s["examples"] for s in sessions] == [3, len(TeacherCache.open(config.output)) - 3]


def test_a_killed_capture_continues_to_the_same_bytes(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(120))
    settings: dict[str, Any] = {"shard": {"examples": 5}, "hidden": {"pooled": True}}
    config = make_config(tmp_path, teacher, rows, **settings)
    script = (
        "import sys; from stages.cache_teacher import *\n"
        "cache_teacher(CacheConfig.model_validate_json(sys.argv[1]), progress=False)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json()], cwd=Path(__file__).parents[1]
    )
    while not (config.output / "shards" / "00001" / "shard.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (config.output / "manifest.json").exists()
    cache_teacher(config, progress=False)
    whole = make_config(tmp_path / "whole", teacher, rows, **settings)
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)


def test_numbers_that_are_not_finite_stop_the_stage_and_name_the_example(
    tmp_path: Path, data: Path
) -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("!")] = torch.nan
    rows = make_rows(COUNT)
    rows[13]["text"] += "!"
    task = {"name": "causal-lm", "block_size": 64, "packing": False, "overlong": "truncate"}
    config = make_config(
        tmp_path,
        save_teacher(tmp_path / "teacher", model),
        write_rows(tmp_path / "rows.jsonl", [{**r, "text": r["text"][-60:]} for r in rows]),
        task=task,
    )
    with pytest.raises(NumericalError, match=r"'row 13': the teacher's logits .* are NaN"):
        cache_teacher(config, progress=False)
    assert (config.output / "shards" / "00001" / "shard.json").is_file()
    assert not (config.output / "shards" / "00002" / "shard.json").exists()


def test_capture_json_says_what_it_took(tmp_path: Path, teacher: Path, data: Path) -> None:
    cache = run(make_config(tmp_path, teacher, data))
    log = json.loads((cache.path / "capture.json").read_text())
    assert log["tokens"] == cache.manifest.totals.tokens
    assert log["targets"] == cache.manifest.totals.targets
    assert log["bytes"] == cache.manifest.totals.bytes
    assert 0 < log["forward_seconds"] < log["seconds"]
    assert (log["device"], log["dtype"]) == ("cpu", "float32")


def test_items_are_consumed_in_order_before_the_block_is_left() -> None:
    seen: list[int] = []

    def consume(item: int) -> None:
        time.sleep(0.001)
        seen.append(item)

    with Background(consume, depth=2) as background:
        for item in range(20):
            background.put(item)
    assert seen == list(range(20))


def test_a_failing_consumer_stops_whoever_feeds_it_without_a_hang() -> None:
    seen: list[int] = []

    def consume(item: int) -> None:
        seen.append(item)
        if item == 3:
            raise OSError("no space left")

    def feed() -> None:
        with Background(consume, depth=1) as background:
            for item in range(10_000):
                background.put(item)

    with pytest.raises(OSError, match="no space left"):
        feed()
    assert seen == [0, 1, 2, 3]


def test_a_consumer_that_fails_on_the_last_item_is_noticed_on_leaving() -> None:
    def consume(item: int) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Background(consume, depth=4) as background:
        background.put(0)


def test_when_the_feeder_fails_what_waits_is_dropped() -> None:
    seen: list[int] = []

    def consume(item: int) -> None:
        time.sleep(0.05)
        seen.append(item)

    with pytest.raises(KeyError, match="bad"), Background(consume, depth=8) as background:
        for item in range(8):
            background.put(item)
        raise KeyError("bad")
    assert len(seen) < 8
