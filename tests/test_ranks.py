"""Several processes train one student: together they are one process with a larger batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sharded_student import train
from small_runs import make_language_cache, make_student_config, read_lines
from small_worlds import assert_close
from torch.distributed import TCPStore

from pipeline.batches import StepSampler
from pipeline.config import dump_config
from pipeline.errors import ConfigError
from pipeline.locking.locks import LOCKS, occupy
from pipeline.runs import read_result
from stages.train_student import train_student

ROOT = Path(__file__).parents[1]
RANK = """
import os, sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.errors import LockError
from stages.train_student import StudentConfig, train_student
try:
    train_student(load_config(StudentConfig, Path(sys.argv[2])))
except LockError as refusal:
    print("refused:", refusal)
train_student(load_config(StudentConfig, Path(sys.argv[1])))
import torch.distributed
torch.distributed.barrier()
os._exit(0)  # Gloo's threads may outlive the interpreter, and abort it
"""


def run_two(*arguments: str) -> list[str]:
    """Run Python in two processes, and return what each of them says.

    They meet, as torchrun's do, at a store that is there already: a port that is only found free
    may be another's when rank 0 asks for it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "PYTHONPATH": str(ROOT),
                "PYTHONFAULTHANDLER": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=560)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return said


def shares(rows: int, size: int, ranks: int, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of every rank."""
    samplers = [StepSampler(rows, size, 5, rank, ranks) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [[list(batch) for batch in sampler] for sampler in samplers]


@given(
    rows=st.integers(1, 300),
    size=st.integers(1, 9),
    ranks=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_ranks_see_every_row_once_in_as_many_steps(
    rows: int, size: int, ranks: int, epoch: int
) -> None:
    if rows < ranks:
        with pytest.raises(ConfigError, match="cannot be shared by"):
            shares(rows, size, ranks)
        return
    found = shares(rows, size, ranks, epoch)
    assert len({len(batches) for batches in found}) == 1
    assert len(found[0]) == len(StepSampler(rows, size, 5, 0, ranks))
    assert all(batch for batches in found for batch in batches)
    seen = [row for batches in found for batch in batches for row in batch]
    assert sorted(seen) == list(range(rows))


@given(rows=st.integers(4, 100), size=st.integers(1, 5), ranks=st.integers(2, 4))
def test_a_step_of_all_ranks_is_a_step_of_one_process_with_the_larger_batch(
    rows: int, size: int, ranks: int
) -> None:
    [alone] = shares(rows, size * ranks, 1)
    together = [
        sorted(row for batch in batches for row in batch)
        for batches in zip(*shares(rows, size, ranks), strict=True)
    ]
    left = rows % (size * ranks)
    if 0 < left < ranks and len(alone) > 1:  # too few for a step of their own
        alone[-2:] = [alone[-2] + alone[-1]]
    assert together == [sorted(batch) for batch in alone]


@given(rows=st.integers(1, 60), size=st.integers(1, 9))
def test_dropping_the_last_batch_leaves_only_whole_ones(rows: int, size: int) -> None:
    batches = list(StepSampler(rows, size, 0, drop_last=True))
    assert [len(batch) for batch in batches] == [size] * (rows // size) or len(batches) == 1


def test_two_processes_train_the_student_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    hidden = {"layers": [-1], "qkv": [-1], "dtype": "float32"}
    cache = make_language_cache(tmp_path, hidden=hidden)
    settings = {
        "losses": [
            {"name": "forward_kl", "weight": 0.9},
            {"name": "cross_entropy", "weight": 0.1},
            {"name": "hidden_mse", "layers": {1: -1}},
            {"name": "minilm", "relation_heads": 4},
        ],
        "evaluation": {"every": 2},
        "max_examples": 13,
        "example_weights": {"by": "split", "weights": {"train": 2.0}},
        "log_slices": ["split"],
        "freeze": {"gradual": {"until": 0.6}},
    }
    training = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1}
    one = train_student(
        make_student_config(
            cache,
            tmp_path / "one",
            **settings,
            training={
                **training,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
            },
        )
    )
    two = make_student_config(
        cache,
        tmp_path / "two",
        **settings,
        training={**training, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    file = tmp_path / "two.yaml"
    file.write_text(dump_config(two), encoding="utf-8")
    with occupy(tmp_path / "held", "train-student"):  # the first rank is refused, and all with it
        held = tmp_path / "held.yaml"
        elsewhere = two.model_copy(update={"output": tmp_path / "held"})
        held.write_text(dump_config(elsewhere), encoding="utf-8")
        said = run_two("-c", RANK, str(file), str(held))
    assert all(f"held: process {os.getpid()} on" in text for text in said)
    assert not list((tmp_path / "held").iterdir())
    assert not (tmp_path / "two" / LOCKS).exists()
    weights = [load_file(run / "model.safetensors") for run in (one, tmp_path / "two")]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)
    for alone, together in zip(read_lines(one), read_lines(tmp_path / "two"), strict=True):
        assert together.keys() == alone.keys()
        for name in alone.keys() - {"seconds", "split"}:
            assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    results = [read_result(run) for run in (one, tmp_path / "two")]
    assert results[0].training["tokens_seen"] == results[1].training["tokens_seen"]
    for metric in results[0].metrics:
        assert results[1].metric(metric.name) == pytest.approx(metric.value, rel=1e-4)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks got, by layout of the shards and tie of the embeddings."""
    folder = tmp_path_factory.mktemp("sharded")
    run_two(str(ROOT / "tests" / "sharded_student.py"), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize(
    ("layout", "fused", "limit"),
    [
        ("root", True, 1e-5),
        ("parts", True, 1e-5),
        ("bent", False, 1e-5),
        ("flat", False, 1e-5),
        ("half", True, 0.05),
    ],
)
def test_a_sharded_student_learns_what_a_whole_one_does(
    tmp_path: Path,
    sharded: list[dict[str, Any]],
    layout: str,
    fused: bool,
    limit: float,
    tied: str,
) -> None:
    """Where its head cannot be fused, it keeps its logits and says so once."""
    alone = train(tmp_path, "whole flat" if layout == "flat" else "whole", tied == "tied")
    for rank in sharded:
        found = rank[f"{layout} {tied}"]
        assert found["fused"] == fused
        assert ["the logits of every position" in line for line in found["said"]] == (
            [] if fused else [True]
        )
        for together, expected in zip(found["steps"], alone.steps, strict=True):
            assert_close(together, expected, limit)
