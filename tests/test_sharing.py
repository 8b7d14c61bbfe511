"""Several processes cache one teacher together: no shard twice, and the bytes of one process."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PROCESSES, strike_once
from small_teachers import make_config, make_llama, make_rows, read_files, save_teacher, write_rows
from small_translators import make_t5, make_translation_config

from pipeline.cache import read_manifest
from pipeline.cache.sharing import parse_range
from pipeline.errors import CacheError, ConfigError
from pipeline.locking.locks import LOCKS, occupy
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.leftovers import remove_leftovers

HELD = ["texts", "beginning", "capture"]  # in the order in which they are waited for


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), make_llama())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(24))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models spend their time waiting for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def share(config: str, doomed: bool) -> None:
    """One of several processes; on one thread, as those of OpenMP do not pass a fork."""
    torch.set_num_threads(1)
    parsed = CacheConfig.model_validate_json(config)
    if doomed:
        strike_once(lambda _: is_outrun(parsed.output))
    cache_teacher(parsed, progress=False, share=True)


def is_outrun(output: Path) -> bool:
    """Whether a shard is claimed; then it waits until another process has finished one."""
    if not list((output / LOCKS).glob("shard-*")):
        return False
    while not list(output.glob("shards/*/shard.json")):
        time.sleep(0.01)
    return True


def start(config: CacheConfig, doomed: bool = False) -> Any:
    process = PROCESSES.Process(target=share, args=(config.model_dump_json(), doomed))
    process.start()
    return process


def test_three_processes_leave_the_bytes_of_one(tmp_path: Path, teacher: Path, data: Path) -> None:
    pca = {"name": "pca", "width": 4}
    settings: dict[str, Any] = {"hidden": {"layers": [-1], "projection": pca}, "seed": 3}
    config = make_config(tmp_path / "shared", teacher, data, **settings)
    workers = [start(config) for _ in range(3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    whole = make_config(tmp_path / "whole", teacher, data, **settings)
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)
    assert not (config.output / LOCKS).exists()
    capture = json.loads((config.output / "capture.json").read_text())
    assert sum(session["examples"] for session in capture["sessions"]) == capture["examples"]
    alone = json.loads((whole.output / "capture.json").read_text())
    assert [capture[name] for name in ("examples", "tokens", "targets")] == [
        alone[name] for name in ("examples", "tokens", "targets")
    ]


@pytest.mark.skipif("STILLROOM_LONG" not in os.environ, reason="takes a minute: make torture")
def test_what_the_teacher_writes_itself_is_written_once(tmp_path: Path) -> None:
    generation = {"num_beams": 2, "max_new_tokens": 4, "batch_size": 2}
    task = {"name": "seq2seq", "targets": "generated", "generation": generation}
    config = make_translation_config(tmp_path, make_t5(), task=task, shard={"examples": 10})
    workers = [start(config) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    whole = config.model_copy(update={"output": tmp_path / "whole"})
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)
    assert not (config.output / "generated.jsonl").exists()


def test_a_killed_worker_costs_its_own_shard_and_nobody_waits(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    config = make_config(tmp_path / "shared", teacher, data, batch={"tokens": 16})
    doomed = start(config, doomed=True)
    while not list((config.output / LOCKS).glob("shard-*")):
        assert doomed.is_alive()
        time.sleep(0.01)
    other = start(config)
    for worker in (doomed, other):
        worker.join()
    assert [doomed.exitcode, other.exitcode] == [-signal.SIGKILL, 0]
    whole = make_config(tmp_path / "whole", teacher, data, batch={"tokens": 16})
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)
    assert not (config.output / LOCKS).exists()


@pytest.mark.parametrize("held", HELD)
def test_what_is_being_written_by_another_is_not_taken_for_a_leftover(
    tmp_path: Path, teacher: Path, data: Path, held: str
) -> None:
    cache = cache_teacher(make_config(tmp_path, teacher, data), progress=False)
    draft = cache / "capture.json.draft"
    with occupy(cache, "cache-teacher", shared=True) as here, here.hold(held):
        draft.write_bytes((cache / "capture.json").read_bytes())
        cleaner = threading.Thread(target=remove_leftovers, args=(cache,))
        cleaner.start()
        before = HELD[: HELD.index(held)]
        while cleaner.is_alive() and not all((cache / LOCKS / name).exists() for name in before):
            time.sleep(0.01)
        cleaner.join(timeout=0.1)  # it would need no longer to end
        assert cleaner.is_alive()
        draft.replace(cache / "capture.json")
    cleaner.join()
    assert not (cache / LOCKS).exists() and not draft.exists()
    read_manifest(cache)


def test_ranges_split_the_work_and_the_last_one_finishes(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    random = {"name": "random", "width": 4}
    settings: dict[str, Any] = {"hidden": {"layers": [-1], "projection": random}}
    config = make_config(tmp_path / "shared", teacher, data, **settings)
    cache_teacher(config, progress=False, shard_range="3:")  # and 0, which projections hang on
    standing = {file.parent.name for file in config.output.glob("shards/*/shard.json")}
    assert {"00000", "00003"} <= standing and not {"00001", "00002"} & standing
    with pytest.raises(CacheError, match="not finished"):
        read_manifest(config.output)
    assert not (config.output / LOCKS).exists()
    cache_teacher(config, progress=False, shard_range="0:3")
    whole = make_config(tmp_path / "whole", teacher, data, **settings)
    cache_teacher(whole, progress=False)
    assert read_files(config.output) == read_files(whole.output)


def test_a_range_of_a_finished_cache_stands_or_is_refused(
    tmp_path: Path, teacher: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, teacher, data)
    cache_teacher(config, progress=False)
    shards = read_manifest(config.output).num_shards
    before = read_files(config.output)
    cache_teacher(config, shard_range=f"1:{shards + 4}")
    told = f" in {shards} shards, 1:{shards} among them; kept"
    assert told in capsys.readouterr().out
    for text, found in (
        (f"{shards}:{shards + 2}", "holds none of the cache's"),
        ("2-3", "no range"),
    ):
        with pytest.raises(ConfigError, match=f"--shard-range {text}: .*{found}"):
            cache_teacher(config, progress=False, shard_range=text)
    assert read_files(config.output) == before


@pytest.mark.parametrize(
    ("text", "found"),
    [("2:4", [2, 3]), (":2", [0, 1]), ("3:", [3, 4]), ("4:9", [4]), (":", [0, 1, 2, 3, 4])],
)
def test_a_range_leaves_its_end_out(text: str, found: list[int]) -> None:
    assert list(parse_range(text, 5)) == found


@pytest.mark.parametrize("text", ["2", "a:b", "-1:2", "3:3", "7:9", "1:2:3", "²:4"])
def test_a_range_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard-range {text}"):
        parse_range(text, 5)


def test_what_is_no_range_is_refused_before_anything_is_read(tmp_path: Path, teacher: Path) -> None:
    config = make_config(tmp_path, teacher, tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="--shard-range 2-3: is no range"):
        cache_teacher(config, progress=False, shard_range="2-3")
