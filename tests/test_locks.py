"""Whoever works on a cache keeps others out or shares with them, and nobody waits for the dead."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from processes import PROCESSES

from pipeline.errors import LockError
from pipeline.locking.exclusive import create_exclusively
from pipeline.locking.locks import LOCKS, Occupant, occupy
from pipeline.locking.owners import Owner


def hold_shard(cache: Path, shared: bool, pipe: Connection) -> None:
    """Hold shard 0 of a cache until the other side says a word."""
    with occupy(cache, "cache-teacher", shared) as here:
        assert here.claim("shard-00000")
        pipe.send("in")
        pipe.recv()


def count_up(cache: Path, counter: Path, times: int) -> None:
    """Add one to a number in a file, reading and writing it while it is held."""
    with occupy(cache, "cache-teacher", shared=True) as here:
        for _ in range(times):
            with here.hold("counter"):
                counter.write_text(str(int(counter.read_text()) + 1))


class Worker:
    """A process that holds shard 0 of a cache until it is told to end."""

    def __init__(self, cache: Path, shared: bool) -> None:
        self.pipe, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=hold_shard, args=(cache, shared, other))
        self.process.start()
        assert self.pipe.recv() == "in"

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()
        assert self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers = []

    def begin(shared: bool = False) -> Worker:
        workers.append(Worker(tmp_path / "cache", shared))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.kill()


def elsewhere(cache: Path, claim: str | None = None, **changes: object) -> Owner:
    """What a process of another machine left, or leaves."""
    owner = replace(
        Owner("feedfacefeedface", "cache-teacher", True, admitted=True, host="far", process=7),
        **{"machine": "another", "patience": 0.5, **changes},
    )
    create_exclusively(cache / LOCKS / f"{owner.token}.json", owner.dump())
    if claim:
        create_exclusively(cache / LOCKS / claim, owner.token.encode())
    return owner


def test_a_second_process_is_refused_and_told_who_is_there_since_when(
    tmp_path: Path, start: Callable[..., Worker]
) -> None:
    worker = start()
    with pytest.raises(LockError) as refusal, occupy(tmp_path / "cache", "verify --repair"):
        pass
    found = str(refusal.value)
    assert f"process {worker.process.pid} on {Owner('', '', True).host}" in found
    assert "(stillroom cache-teacher) has been at work there since 2" in found
    assert "\n" not in found
    worker.end()
    assert not (tmp_path / "cache" / LOCKS).exists()
    with occupy(tmp_path / "cache", "verify --repair"):
        assert (tmp_path / "cache" / LOCKS).is_dir()
    assert not (tmp_path / "cache" / LOCKS).exists()


def test_a_killed_process_is_told_of_once_and_blocks_nobody(
    tmp_path: Path, start: Callable[..., Worker]
) -> None:
    worker = start()
    worker.kill()
    told: list[str] = []
    with occupy(tmp_path / "cache", "cache-teacher", tell=told.append) as here:
        assert here.claim("shard-00000")
        assert here.claim("shard-00001")
    (line,) = told
    assert f"process {worker.process.pid} on" in line and "has died" in line
    assert not (tmp_path / "cache" / LOCKS).exists()


def test_those_who_share_work_beside_one_another_and_keep_others_out(
    tmp_path: Path, start: Callable[..., Worker]
) -> None:
    worker = start(shared=True)
    for purpose, way in (("cache-teacher", "ended, or share it"), ("verify", "ended$")):
        with (
            pytest.raises(LockError, match=way),
            occupy(tmp_path / "cache", purpose, otherwise="share it"),
        ):
            pass
    with occupy(tmp_path / "cache", "cache-teacher", shared=True) as here:
        assert not here.claim("shard-00000")
        assert here.claim("shard-00001")
        worker.end()
        assert here.claim("shard-00000")
    assert not (tmp_path / "cache" / LOCKS).exists()


def test_a_shard_of_a_killed_sharer_is_taken_over(
    tmp_path: Path, start: Callable[..., Worker]
) -> None:
    told: list[str] = []
    with occupy(tmp_path / "cache", "cache-teacher", shared=True, tell=told.append) as here:
        worker = start(shared=True)
        assert not here.claim("shard-00000")
        worker.kill()
        assert here.claim("shard-00000")
        assert "has died" in told[0]
        here.release("shard-00000")
        assert here.claim("shard-00000")
    assert len(told) == 1
    assert not (tmp_path / "cache" / LOCKS).exists()


def test_a_process_id_that_was_given_again_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    owner = Owner("feedfacefeedface", "cache-teacher", False, admitted=True)
    create_exclusively(tmp_path / LOCKS / f"{owner.token}.json", owner.dump())
    with pytest.raises(LockError, match="has been at work"), occupy(tmp_path, "cache-teacher"):
        pass
    reborn = replace(owner, started="1")
    (tmp_path / LOCKS / f"{owner.token}.json").write_bytes(reborn.dump())
    with occupy(tmp_path, "cache-teacher"):
        pass


def test_what_a_newer_stillroom_says_of_an_owner_is_passed_over(tmp_path: Path) -> None:
    owner = Owner("feedfacefeedface", "cache-teacher", False, admitted=True)
    file = tmp_path / LOCKS / f"{owner.token}.json"
    said = json.loads(owner.dump())
    create_exclusively(file, json.dumps({**said, "rack": 7}).encode())
    with pytest.raises(LockError, match="has been at work"), occupy(tmp_path, "cache-teacher"):
        pass
    file.unlink()
    for damage in ({"patience": "long"}, {"beat": None}, {"seen": []}):
        create_exclusively(file, json.dumps({**said, **damage}).encode())
        with occupy(tmp_path, "cache-teacher"):
            pass


def test_a_killed_process_counts_as_dead_before_its_parent_asks_for_it(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    owner = Owner("feedfacefeedface", "verify", False, True, process=process.pid, started=started)
    create_exclusively(tmp_path / LOCKS / f"{owner.token}.json", owner.dump())
    with pytest.raises(LockError, match=str(process.pid)), occupy(tmp_path, "cache-teacher"):
        pass
    process.kill()
    told: list[str] = []
    while not told:
        with suppress(LockError), occupy(tmp_path, "cache-teacher", tell=told.append):
            pass
    process.wait()


def test_a_process_of_another_host_that_fell_silent_is_listened_for_and_then_taken_over(
    tmp_path: Path,
) -> None:
    elsewhere(tmp_path, "shard-00003")
    told: list[str] = []
    with occupy(tmp_path, "cache-teacher", tell=told.append):
        pass
    assert ["listened for" in told[0], "has died" in told[1]] == [True, True]
    assert "process 7 on far" in told[1]
    with occupy(tmp_path, "cache-teacher", shared=True) as here:
        elsewhere(tmp_path, "shard-00003")
        assert not here.claim("shard-00003")
        while not here.claim("shard-00003"):
            time.sleep(0.05)


def test_one_that_was_silent_for_an_hour_is_not_waited_for(tmp_path: Path) -> None:
    elsewhere(tmp_path, "gate", seen=time.time() - 4000)
    told: list[str] = []
    with occupy(tmp_path, "cache-teacher", tell=told.append):
        pass
    assert "has died" in told[0] and len(told) == 1


def beat(cache: Path, owner: Owner) -> Owner:
    """Another heartbeat of a process of another machine."""
    living = replace(owner, beat=owner.beat + 1)
    (cache / "beat").write_bytes(living.dump())
    (cache / "beat").replace(cache / LOCKS / f"{owner.token}.json")
    return living


def test_one_whose_heart_beats_is_left_alone_whatever_its_clock_says(tmp_path: Path) -> None:
    owner = elsewhere(tmp_path, seen=time.time() + 1e6, patience=60.0)
    ended = threading.Event()

    def live() -> None:
        living = owner
        while not ended.wait(0.1):
            living = beat(tmp_path, living)

    heart = threading.Thread(target=live)
    heart.start()
    try:
        with pytest.raises(LockError, match="process 7 on far"), occupy(tmp_path, "verify"):
            pass
    finally:
        ended.set()
        heart.join()


def test_a_claim_of_one_whose_heart_beats_is_never_free(tmp_path: Path) -> None:
    with occupy(tmp_path, "cache-teacher", shared=True) as here:
        owner = elsewhere(tmp_path, "shard-00003", seen=time.time() - 1e3, patience=0.1)
        for _ in range(8):
            assert not here.claim("shard-00003")
            time.sleep(0.15)  # longer than anybody is patient without a heartbeat
            owner = beat(tmp_path, owner)
        while not here.claim("shard-00003"):
            time.sleep(0.05)


def test_a_process_that_was_taken_for_dead_stops_before_it_writes(tmp_path: Path) -> None:
    with occupy(tmp_path, "cache-teacher") as here:
        here.require()
        (tmp_path / LOCKS / f"{here.owner.token}.json").unlink()
        with pytest.raises(LockError, match="taken over by another process"):
            here.require()


def test_a_claim_that_was_taken_over_is_not_given_back_by_its_first_owner(tmp_path: Path) -> None:
    with (
        occupy(tmp_path, "cache-teacher", shared=True) as asleep,
        occupy(tmp_path, "cache-teacher", shared=True) as awake,
    ):
        assert asleep.claim("shard-00000")
        assert not awake.claim("shard-00000")
        (tmp_path / LOCKS / f"{asleep.owner.token}.json").unlink()
        assert awake.claim("shard-00000")
        asleep.release("shard-00000")
        assert awake.claim("shard-00000")
        assert not asleep.claim("shard-00000")


def test_of_many_that_find_one_dead_owner_one_takes_its_place(tmp_path: Path) -> None:
    with ExitStack() as stack:
        many = [
            stack.enter_context(occupy(tmp_path, "cache-teacher", shared=True)) for _ in range(6)
        ]
        for trial in range(30):
            name = f"shard-{trial:05d}"
            create_exclusively(tmp_path / LOCKS / name, b"first")
            create_exclusively(tmp_path / LOCKS / f"{name}.first", b"second")  # who died as well
            barrier = threading.Barrier(len(many))
            won: list[Occupant] = []

            def race(
                mine: Occupant,
                name: str = name,
                barrier: threading.Barrier = barrier,
                won: list[Occupant] = won,
            ) -> None:
                barrier.wait()
                if mine.claim(name):
                    won.append(mine)

            threads = [threading.Thread(target=race, args=(mine,)) for mine in many]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            won[0].release(name)
            assert not list((tmp_path / LOCKS).glob(f"{name}*"))


def test_several_processes_never_hold_one_thing_at_a_time(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    workers = [
        PROCESSES.Process(target=count_up, args=(tmp_path / "cache", counter, 10)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "30"
    assert not (tmp_path / "cache" / LOCKS).exists()


def test_a_folder_that_cannot_hold_locks_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCKS).write_text("a file")
    found = r"locks: cannot be written \(.*\); nothing was changed"
    with pytest.raises(LockError, match=found), occupy(tmp_path, "cache-teacher"):
        pass
