"""Several machines cache one teacher together: no shard twice, and nobody waits for the dead."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from other_machines import move_to
from processes import PROCESSES, strike_once
from small_relay import Rule
from small_store import Bucket
from small_teachers import make_config, make_llama, make_rows, read_files, save_teacher, write_rows

from pipeline.errors import LockError
from pipeline.locking.locks import LOCKS
from stages.cache_teacher import CacheConfig, cache_teacher

Start = Callable[..., Any]


# Where a machine falls asleep that writes shard 0: an audit event of Python, what it is about, and
# whether the shard stands.
NAPS = {
    "beginning": ("os.mkdir", r"/drafts/00000\.[0-9a-f]+$", False),
    "sealing": ("open", r"/drafts/00000\.[0-9a-f]+/shard\.json", False),
    "moving": ("os.rename", r"/drafts/00000\.[0-9a-f]+$", False),
    "leaving": ("open", r"/locks/shard-00000$", True),
}


def share(config: str, host: str, environment: dict[str, str], nap: str | None) -> None:
    """One of several processes; on one thread, as those of OpenMP do not pass a fork.

    Args:
        nap: of NAPS.
    """
    parsed = CacheConfig.model_validate_json(config)
    move_to(host, environment)
    torch.set_num_threads(1)
    if nap is not None:
        event, pattern, after = NAPS[nap]
        shard = parsed.output / "shards" / "00000" / "shard.json"
        strike_once(
            lambda name: re.search(pattern, name) and shard.is_file() == after,
            signal.SIGSTOP,
            event,
        )
    cache_teacher(parsed, progress=False, share=True)


def wait_for(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_teacher(root / "teacher", make_llama())
    write_rows(root / "rows.jsonl", make_rows(20))
    cache_teacher(configure(root, root / "whole"), progress=False)
    return root


def configure(world: Path, output: Path | str) -> CacheConfig:
    sizes = {"shard": {"examples": 2}, "batch": {"tokens": 16}}
    return make_config(world, world / "teacher", world / "rows.jsonl", output=output, **sizes)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Begins a process on a machine of a name, which others wait for until it counts as dead."""
    monkeypatch.setenv("STILLROOM_STORE_TIMEOUT", "600")
    monkeypatch.setenv("STILLROOM_CACHE_DIR", str(tmp_path / "here"))
    begun = []

    def begin(
        config: CacheConfig, host: str, patience: float = 60.0, nap: str | None = None
    ) -> Any:
        known = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "STILLROOM_"))}
        known["STILLROOM_CACHE_DIR"] = str(tmp_path / host)
        known["STILLROOM_LOCK_PATIENCE"] = str(patience)
        arguments = (config.model_dump_json(), host, known, nap)
        begun.append(PROCESSES.Process(target=share, args=arguments))
        begun[-1].start()
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.join()


def count_puts(bucket: Bucket, name: str) -> Counter[str]:
    """How often a file of each shard was sent, by the shard."""
    puts = (served.path for served in bucket.store.served if served.method == "PUT")
    return Counter(path.split("/")[-2] for path in puts if path.endswith(f"/{name}"))


def test_machines_share_a_store_and_take_over_from_one_that_dies(
    world: Path, bucket: Bucket, start: Start
) -> None:
    """It is killed in the middle of sending a shard, when the others are done with theirs."""
    config, expected = configure(world, bucket.url), read_files(world / "whole")
    every = {name.split("/")[1]: 1 for name in expected if name.endswith("shard.json")}
    with bucket.store.broken(Rule("silence", "PUT", "shards/00001/rows.arrow")):
        doomed = start(config, "first-machine", patience=10.0)
        wait_for(lambda: any(served.fault for served in bucket.store.served))
        refusal = rf"process {doomed.pid} on first-machine .*start all of them with --share"
        with pytest.raises(LockError, match=refusal):
            cache_teacher(config, progress=False)
        others = [start(config, "second-machine"), start(config, "third-machine")]
        wait_for(lambda: max(every) in count_puts(bucket, "shard.json"))
        doomed.kill()
        for process in (doomed, *others):
            process.join()
        assert [p.exitcode for p in (doomed, *others)] == [-signal.SIGKILL, 0, 0]
        assert count_puts(bucket, "shard.json") == every
        assert count_puts(bucket, "rows.arrow") == every | {"00001": 2}
    found = bucket.contents()
    assert not [name for name in found if name.startswith(f"{LOCKS}/")]
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("nap", NAPS)
def test_a_machine_that_fell_asleep_leaves_alone_what_others_took_over(
    world: Path, tmp_path: Path, start: Start, nap: str
) -> None:
    config = configure(world, tmp_path / "shared")
    asleep = start(config, "first-machine", patience=1.0, nap=nap)
    wait_for(lambda: Path(f"/proc/{asleep.pid}/stat").read_text().rpartition(") ")[2][0] == "T")
    assert (config.output / LOCKS / "shard-00000").is_file()
    other = start(config, "second-machine")
    other.join()
    assert other.exitcode == 0
    expected = read_files(world / "whole")
    assert read_files(config.output) == expected
    os.kill(asleep.pid, signal.SIGCONT)
    asleep.join()
    assert asleep.exitcode == 1  # told that it was taken over
    assert read_files(config.output) == expected
