"""What is tortured: a command, the folder that it writes, and what must come of it.

world(folder) -> teacher, data, a cache and a student to begin with -> Scene for each command
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from small_runs import TINY
from small_teachers import make_llama, make_rows, save_teacher, write_rows
from small_translators import make_bart, make_pair_data

from stages.cache_teacher import CacheConfig
from stages.train_student import StudentConfig
from stages.train_tasks import TasksConfig
from stages.train_teacher import TrainTeacherConfig

LITTER = re.compile(
    r"\.draft$|\.unfitted$|^examples.*\.arrow$|^generated\.jsonl$|^draft\.json$|^locks$"
    r"|^checkpoints$|^config\.yaml\.|\.lock$|^\.?tmp|\.partial$"
)


_TASKS = 2
_TRAININGS = {
    StudentConfig: "train-student",
    TasksConfig: "train-tasks",
    TrainTeacherConfig: "train-teacher",
}


def remove(output: Path) -> None:
    """Begin with nothing."""
    shutil.rmtree(output, ignore_errors=True)


@dataclass(frozen=True)
class Scene:
    """A command that must survive.

    Attributes:
        name: shown.
        output: the folder that it writes; gone before a trial.
        command: arguments of `stillroom`.
        content: what may not depend on how often it was begun, by file.
        treasures: what is finished in a folder under way, none of which may be made again: for
            each a name, and what changes when it is.
        promise: what the next start says if it goes on from what is finished; empty where that is
            nothing, or all.
        stands: what is said, with exit code 1, where all stands that the command makes.
        alone: whether a second process is refused while one is at work.
        follow_up: commands that complete what the command leaves.
        prepare: makes the folder that the command begins with.
    """

    name: str
    output: Path
    command: list[str]
    content: Callable[[Path], dict[str, bytes]]
    treasures: Callable[[Path], dict[str, Any]]
    promise: Callable[[Path], str]
    stands: str = ""
    alone: bool = False
    follow_up: Sequence[Sequence[str]] = ()
    prepare: Callable[[Path], None] = remove


def make_scenes(root: Path) -> list[Scene]:
    """Stage one and two in their forms, over data and models of their own in a folder; the training
    of a teacher."""
    pairs = root / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    teacher = save_teacher(root / "teacher", make_llama())
    rows = make_rows(18, longest=12)
    files = {name: str(root / f"{name}.jsonl") for name in ("train", "test")}
    write_rows(Path(files["train"]), rows[:14])
    write_rows(Path(files["test"]), rows[14:])
    data = {"source": "json", "files": files, "splits": {"train": "train", "test": "test"}}
    capture = {
        "task": {"name": "causal-lm", "block_size": 32, "packing": False},
        "data": {**data, "carry": ["language"]},
        "teacher": {"model": str(teacher)},
        "targets": {"top_k": 8, "codec": "steps"},
        "hidden": {"layers": [0, -1], "projection": {"name": "pca", "width": 4}},
        "batch": {"tokens": 128, "workers": 1},
        "shard": {"examples": 6},
    }
    written = {
        **capture,
        "task": {
            "name": "seq2seq",
            "targets": "generated",
            "generation": {"max_new_tokens": 5, "temperature": 1.0},
        },
        "data": make_pair_data(pairs, 9, 3),
        "teacher": {"model": str(save_teacher(root / "translator", make_bart()))},
        "hidden": {},
    }
    student: dict[str, Any] = {
        "cache": str(root / "caches" / "plain"),
        "student": {"from": "scratch", "architecture": "llama", **TINY},
        "losses": [{"name": "forward_kl"}, {"name": "hidden_mse", "layers": {1: -1}}],
        "evaluation": {"every": 2},
        "training": {"per_device_train_batch_size": 4, "max_steps": 6, "use_cpu": True},
    }
    patient = {
        **student,
        "losses": [{"name": "forward_kl"}],
        "evaluation": {"every": 1, "early_stopping": {"metric": "loss", "patience": 2}},
        "training": {**student["training"], "learning_rate": 1.0, "lr_scheduler_type": "constant"},
    }
    staged = {
        **student,
        "losses": [{"name": "forward_kl"}],
        "stages": [
            {"name": "hidden", "until": 0.5, "losses": [{"name": "hidden_mse", "layers": {1: -1}}]},
            {"name": "logits"},
        ],
    }
    tasks = {
        **{name: student[name] for name in ("student", "evaluation", "training")},
        "tasks": {
            "sure": {"cache": student["cache"], "losses": [{"name": "forward_kl"}], "share": 2.0},
            "deep": {"cache": student["cache"], "losses": student["losses"]},
        },
    }
    taught = {
        "task": {"name": "causal-lm", "block_size": 32},
        "data": data,
        "model": student["student"],
        "tokenizer": {"vocab_size": 260},
        "evaluation": student["evaluation"],
        "training": student["training"],
    }
    first = _scene(root, "stage one", "caches/plain", CacheConfig, capture)
    return [
        first,
        _repair(root, first),
        _scene(root, "stage one, texts of its own", "caches/written", CacheConfig, written),
        _scene(root, "stage two", "runs/plain", StudentConfig, student),
        _scene(root, "stage two, with patience", "runs/patient", StudentConfig, patient),
        _scene(root, "stage two, in stages", "runs/staged", StudentConfig, staged),
        _scene(root, "train-tasks", "runs/tasks", TasksConfig, tasks),
        _scene(root, "train-teacher", "runs/taught", TrainTeacherConfig, taught),
    ]


def _scene(root: Path, name: str, output: str, kind: Any, settings: dict[str, Any]) -> Scene:
    file = root / f"{output.replace('/', '-')}.yaml"
    file.write_text(yaml.safe_dump({**settings, "output": str(root / output)}), encoding="utf-8")
    if kind is CacheConfig:
        marks = (read_cache_files, count_shards, promise_shards)
        return Scene(name, root / output, ["cache-teacher", str(file)], *marks, alone=True)
    marks = (read_run_files, _ended_stages, _promise_steps)
    if kind is TasksConfig:
        marks = (read_run_files, _find_results, _promise_tasks)
    return Scene(name, root / output, [_TRAININGS[kind], str(file)], *marks, alone=True)


def _repair(root: Path, whole: Scene) -> Scene:
    """Verify and repair a damaged copy of a cache, in its place."""
    kept = root / "kept"

    def prepare(output: Path) -> None:
        if not kept.exists():  # the first time, `whole` has just been finished
            shutil.copytree(output, kept)
            for name in ("shards/00001/rows.arrow", "index/ids.arrow"):
                content = bytearray((kept / name).read_bytes())
                content[len(content) // 2] ^= 1
                (kept / name).write_bytes(content)
            (kept / "shards/00002/rows.arrow").unlink()
            (kept / "stray").write_text("of nobody", encoding="utf-8")
        remove(output)
        shutil.copytree(kept, output)

    return replace(
        whole,
        name="verify --repair",
        command=["verify", str(whole.output), "--repair"],
        treasures=lambda cache: {k: v for k, v in count_shards(cache).items() if k == "00000"},
        promise=lambda cache: "",
        follow_up=[whole.command],
        prepare=prepare,
    )


def find_litter(folder: Path) -> list[str]:
    """What a finished folder should not hold."""
    found = (path for path in folder.rglob("*") if LITTER.search(path.name))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def read_cache_files(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but capture.json, which tells of time."""
    files = _read_files(cache)
    return {name: files[name] for name in files if Path(name).name != "capture.json"}


def read_run_files(run: Path) -> dict[str, bytes]:
    """Every file of a run, without the seconds that it took."""
    files = _read_files(run)
    for name, content in files.items():
        if Path(name).name in ("result.json", "metrics.jsonl"):
            files[name] = re.sub(rb'"(evaluation_)?seconds": [0-9.e-]+', b"", content)
        elif Path(name).name == "README.md":
            files[name] = re.sub(rb"[0-9.,]+ s on ", b"", content)
    return files


def _read_files(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def count_shards(cache: Path) -> dict[str, Any]:
    """Shards that stand, and when they were written."""
    return {
        file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in cache.glob("shards/*/shard.json")
    }


def promise_shards(cache: Path) -> str:
    count = len(count_shards(cache))
    under_way = (cache / "draft.json").is_file() and not (cache / "manifest.json").is_file()
    return f"continues after {count} of" if count and under_way else ""


def _ended_stages(run: Path) -> dict[str, Any]:
    """Stages that have ended, and when."""
    return {
        file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in run.glob("checkpoints/*/stage.json")
    }


def _find_results(run: Path) -> dict[str, Any]:
    """Of several tasks: the files of those that are finished, and when they were written."""
    return {
        file.relative_to(run).as_posix(): (file.stat().st_ino, file.stat().st_mtime_ns)
        for result in run.glob("*/result.json")
        for file in result.parent.iterdir()
        if not LITTER.search(file.name)
    }


def _promise_tasks(run: Path) -> str:
    """As of a run of one stage, until every task is finished."""
    finished = len(list(run.glob("*/result.json")))
    return _promise_steps(run) if finished < _TASKS else ""


def _promise_steps(run: Path) -> str:
    """Of a run of one stage: the last step that a whole checkpoint holds."""
    saved = []
    for state in run.glob("checkpoints/checkpoint-*/trainer_state.json"):
        try:
            saved.append(int(json.loads(state.read_text(encoding="utf-8"))["global_step"]))
        except ValueError:
            continue  # cut off
    under_way = (run / "config.yaml").is_file() and not (run / "result.json").is_file()
    return f"continues after step {max(saved)}" if saved and under_way else ""
