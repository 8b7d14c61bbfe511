"""The house keeps its order: imports run downwards, configs load, the README tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config, parse_config
from stages.cache_teacher import CacheConfig
from stages.cli import app
from stages.import_reading import ImportConfig
from stages.rounds import RoundsConfig
from stages.shipped import CONFIGS
from stages.train_student import StudentConfig
from stages.train_teacher import TrainTeacherConfig

ROOT = Path(__file__).parents[1]

# Lower floors first; a module may import its own floor only inside its own room.
FLOORS: list[set[str]] = [
    {"errors"},
    {"targets", "metrics", "text_metrics", "storage"},
    {"config", "examples", "locking", "runs"},
    {"identity", "positions", "safe_loading", "scores", "sentences"},
    {"heads"},
    {"sources", "attention", "losses.base", "tasks.base"},
    {"cache", "losses", "tasks", "teacher", "student", "report"},
    {"sampling", "accounts"},
    {
        *("arguments", "batches", "beginning", "capture", "capture_log", "crossing", "curve"),
        *(
            "evaluation",
            "exam",
            "exchange",
            "export",
            "freezing",
            "generating",
            "joining",
            "lessons",
        ),
        *("lineage", "loader"),
        *("lockstep", "optimizing", "outputs", "reading", "resuming", "staging"),
        *("teachers", "terms", "trainer", "training"),
    },
]
STAGE_FLOOR = len(FLOORS)
MODELS = {
    "cache": CacheConfig,
    "import": ImportConfig,
    "rounds": RoundsConfig,
    "student": StudentConfig,
    "teacher": TrainTeacherConfig,
}


def _room(module: str) -> str:
    """The room of a module: pipeline.cache.rows -> cache; pipeline.losses.base -> losses.base."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[1:2] == ["base"] else parts[0]


def _floor(module: str) -> int:
    if module.startswith("stages"):
        return STAGE_FLOOR
    room = _room(module)
    found = [level for level, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{module} stands in no room of the house; give it one in FLOORS"
    return found[0]


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if re.match(r"(pipeline|stages)\.", name)}


def _sources() -> list[tuple[str, Path]]:
    paths = [*sorted((ROOT / "pipeline").rglob("*.py")), *sorted((ROOT / "stages").rglob("*.py"))]
    named = [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in paths]
    return [(name.removesuffix(".__init__"), path) for name, path in named]


MODULES = [(name, path) for name, path in _sources() if "." in name]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_run_downwards(name: str, path: Path) -> None:
    for imported in _imports(path):
        below = _floor(imported) < _floor(name)
        same_floor = _floor(imported) == _floor(name)
        top = _floor(name) >= len(FLOORS) - 1  # the trainer's floor and the stages call one another
        same_room = not imported.startswith("stages") and _room(imported) == _room(name)
        assert below or (same_floor and (top or same_room)), f"{name} imports {imported}"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_no_module_has_300_lines_and_no_function_60(name: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines < 60, f"{name}.{node.name} has {lines}"


def test_the_cache_opens_without_transformers() -> None:
    code = "import sys, pipeline.cache; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(MODELS[path.parent.name], path).output


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE))
    assert named and named <= targets, named - targets
    commands = {command.name for command in app.registered_commands}
    used = set(re.findall(r"stillroom ([a-z]+-?[a-z]*)", text))
    assert used and used <= commands, used - commands
    for config in re.findall(r"stages/configs/[a-z]+/[a-z0-9-]+\.yaml", text):
        assert (ROOT / config).is_file(), config


def test_the_readme_leaves_no_table_open() -> None:
    assert "<!--" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.strip().splitlines()[-1] == "make test"


def _readme_configs() -> list[dict[str, Any]]:
    """The YAML blocks of the README in order: a cache, a student, then parts of a student and
    imports."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_the_configs_of_the_readme_load() -> None:
    cache, student, *others = _readme_configs()
    parse_config(CacheConfig, cache, "the README's cache")
    parse_config(StudentConfig, student, "the README's student")
    parts = [block for block in others if "format" not in block]
    imports = [block for block in others if "format" in block]
    assert parts and imports
    for block in imports:
        parse_config(ImportConfig, block, "the README's import")
    for part in parts:
        whole = {k: v for k, v in student.items() if not ("stages" in part and k == "losses")}
        parse_config(StudentConfig, whole | part, "the README's parts")
