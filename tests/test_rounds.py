"""Students become teachers: whose cache each one learns from, and that a loop can be continued."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import TINY, make_data
from small_teachers import make_llama, save_teacher

from pipeline.cache import TeacherCache
from pipeline.config import parse_config
from pipeline.errors import ConfigError
from pipeline.identity import digest_weights
from pipeline.student import load_model
from pipeline.tasks.causal_lm import CausalLM
from stages.rounds import RoundsConfig, run_rounds


def make_rounds(root: Path, names: tuple[str, ...], **changes: Any) -> RoundsConfig:
    student = {
        "student": {"from": "scratch", "architecture": "llama", **TINY},
        "losses": [{"name": "forward_kl"}],
        "training": {"max_steps": 2, "use_cpu": True},
    }
    settings = {
        "output": str(root / "loop"),
        "cache": {
            "task": {"name": "causal-lm", "block_size": 32},
            "data": make_data(root),
            "teacher": {"model": str(root / "teacher")},
            "targets": {"top_k": 8},
        },
        "students": {name: {**student, "seed": seed} for seed, name in enumerate(names)},
        **changes,
    }
    return parse_config(RoundsConfig, settings, "rounds")


def teacher_of(cache: Path) -> object:
    return TeacherCache.open(cache).manifest.identity.teacher["digest"]


def weights_of(run: Path) -> str:
    return digest_weights(load_model(str(run), CausalLM(), 300))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rounds")
    save_teacher(root / "teacher", make_llama())
    return root


def test_each_born_again_student_learns_from_the_one_before_it(world: Path) -> None:
    config = make_rounds(world, ("own",), output=str(world / "again"))
    page = run_rounds(config)
    caches, runs = world / "again" / "caches", world / "again" / "runs"
    assert teacher_of(caches / "own-1") == digest_weights(make_llama())
    assert teacher_of(caches / "own-2") == weights_of(runs / "own-1")
    assert weights_of(runs / "own-1") != weights_of(runs / "own-2")
    assert "own-2" in page.read_text(encoding="utf-8")
    before = {file: file.stat().st_mtime_ns for file in (world / "again").rglob("*.safetensors")}
    run_rounds(config)  # all turns stand
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_several_students_take_turns_and_go_on_from_their_own_weights(world: Path) -> None:
    config = make_rounds(world, ("one", "two"), warm=True, output=str(world / "turns"))
    turns = [(turn.cache.teacher.model, turn.student.output.name) for turn in config.turns()]
    runs = world / "turns" / "runs"
    assert turns == [
        (str(world / "teacher"), "one-1"),
        (str(runs / "one-1"), "two-1"),
        (str(runs / "two-1"), "one-2"),
        (str(runs / "one-2"), "two-2"),
    ]
    origins = [turn.student.student.model_dump().get("model") for turn in config.turns()]
    assert origins == [None, None, str(runs / "one-1"), str(runs / "two-1")]
    run_rounds(config)
    assert teacher_of(world / "turns" / "caches" / "one-2") == weights_of(runs / "two-1")


def test_what_is_wrong_with_any_turn_is_said_before_the_first(tmp_path: Path) -> None:
    student = {"student": {"from": "scratch", "architecture": "llama"}, "loses": []}
    with pytest.raises(ConfigError, match=r"students\.own: .*unknown key 'loses'; did you mean"):
        make_rounds(tmp_path, ("own",), students={"own": {**student, "losses": ["forward_kl"]}})
