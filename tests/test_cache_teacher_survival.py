"""An interrupted capture loses only the shard under way, and never reports success."""

import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PROCESSES, strike_once
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
    LockError,
    NumericalError,
)
from pipeline.locking.locks import occupy
from pipeline.teacher import Background, Teacher, map_in_order
from pipeline.teacher.background import AbandonedError
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


def capture_until_killed(config: str) -> None:
    """Die when the second shard stands; on one thread, as those of OpenMP do not pass a fork."""
    torch.set_num_threads(1)
    parsed = CacheConfig.model_validate_json(config)
    strike_once(lambda _: (parsed.output / "shards" / "00001" / "shard.json").is_file())
    cache_teacher(parsed, progress=False)


def test_a_killed_capture_continues_to_the_same_bytes(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(120))
    settings: dict[str, Any] = {"shard": {"examples": 5}, "hidden": {"pooled": True}}
    config = make_config(tmp_path, teacher, rows, **settings)
    process = PROCESSES.Process(target=capture_until_killed, args=(config.model_dump_json(),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (config.output / "shards" / "00001" / "shard.json").is_file()
    assert not (config.output / "manifest.json").exists()
    assert (config.output / "locks").is_dir()
    cache_teacher(config, progress=False)
    assert not (config.output / "locks").exists()
    whole = make_config(tmp_path / "whole", teacher, rows, **settings)
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)


def test_a_second_capture_is_refused_and_harms_nothing(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    config = make_config(tmp_path, teacher, data)
    with (
        occupy(config.output, "cache-teacher"),
        pytest.raises(LockError, match=r"has been at work there since .* --share"),
    ):
        cache_teacher(config, progress=False)
    assert not list(config.output.iterdir())
    cache_teacher(config, progress=False)
    with occupy(config.output, "verify --repair"):  # one that stands is only read
        cache_teacher(config, progress=False)


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

    def consume(items: Iterator[int]) -> None:
        for item in items:
            time.sleep(0.001)
            seen.append(item)

    with Background(consume, depth=2) as background:
        for item in range(20):
            background.put(item)
    assert seen == list(range(20))


def test_a_failing_consumer_stops_whoever_feeds_it_without_a_hang() -> None:
    seen: list[int] = []

    def consume(items: Iterator[int]) -> None:
        for item in items:
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
    def consume(items: Iterator[int]) -> None:
        next(items)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Background(consume, depth=4) as background:
        background.put(0)


def test_when_the_feeder_fails_what_waits_is_dropped_and_the_consumer_is_told() -> None:
    many = 100_000  # so many that they would take minutes
    seen: list[int] = []
    ended: list[str] = []

    def consume(items: Iterator[int]) -> None:
        try:
            for item in items:
                time.sleep(0.01)
                seen.append(item)
            ended.append("whole")
        except AbandonedError:
            ended.append("abandoned")
            raise

    with pytest.raises(KeyError, match="bad"), Background(consume, depth=many) as background:
        for item in range(many):
            background.put(item)
        raise KeyError("bad")
    assert len(seen) < many
    assert ended == ["abandoned"]


def test_results_come_in_order_and_no_worker_runs_far_ahead() -> None:
    begun: list[int] = []

    def slow_first(item: int) -> int:
        begun.append(item)
        time.sleep(0.02 if item == 0 else 0.0)
        return item * item

    results = map_in_order(slow_first, range(100), workers=3)
    assert next(results) == 0
    assert max(begun) < 6
    assert list(results) == [item * item for item in range(1, 100)]
    assert sorted(begun) == list(range(100))


@pytest.mark.parametrize("where", ["function", "items"])
def test_what_fails_on_a_worker_or_in_the_items_is_raised_and_nothing_more_begins(
    where: str,
) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if where == "function" and item == 5:
            raise OSError("no such item")
        return item

    def items() -> Iterator[int]:
        for item in range(1000):
            if where == "items" and item == 5:
                raise OSError("no such item")
            yield item

    with pytest.raises(OSError, match="no such item"):
        list(map_in_order(work, items(), workers=2))
    assert len(begun) < 12


def test_bytes_do_not_depend_on_how_many_batches_are_asked_at_a_time(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, three = (
            make_config(
                tmp_path / f"{count}", teacher, data, batch={"tokens": 96, "workers": count}
            )
            for count in (1, 3)
        )
        caches = [run(config) for config in (one, three)]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert read_files(caches[0].path) == read_files(caches[1].path)
    logs = [json.loads((cache.path / "capture.json").read_text()) for cache in caches]
    assert [log["workers"] for log in logs] == [1, 3]


def test_an_error_of_any_worker_stops_the_stage_with_that_error(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = Teacher.capture

    def fail_late(self: Teacher, *arguments: Any, **options: Any) -> Any:
        asked.append(threading.current_thread().name)
        if len(asked) == 4:
            raise RuntimeError("out of memory")
        return answer(self, *arguments, **options)

    monkeypatch.setattr(Teacher, "capture", fail_late)
    batch = {"tokens": 96, "workers": 3}
    config = make_config(tmp_path / "cache", teacher, data, batch=batch)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache_teacher(config, progress=False)
    assert not (config.output / "manifest.json").exists()
    monkeypatch.setattr(Teacher, "capture", answer)
    cache_teacher(config, progress=False)
    whole = make_config(tmp_path / "whole", teacher, data, batch=batch)
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)
