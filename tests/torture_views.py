"""What is made of a cache that stands, tortured too: views, more of it, an export, an import."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from small_teachers import make_rows, write_rows
from torture_scenes import Scene, count_shards, promise_shards, read_cache_files, remove

from stages.export_cache import export_cache
from stages.select import Choice, select


def make_view_scenes(root: Path, whole: Scene) -> list[Scene]:
    """Scenes over the cache that another one makes."""
    capture = yaml.safe_load(Path(whole.command[1]).read_text(encoding="utf-8"))
    cache, views = whole.output, root / "views"
    train, test = views / "train", views / "test"

    def view(name: str, *command: str) -> Scene:
        output = views / name
        return Scene(
            name,
            output,
            [command[0], *command[1:], str(output)],
            content=read_cache_files,
            treasures=lambda output: {},
            promise=lambda output: "",
        )

    def split() -> None:
        for output in (train, test):
            select(cache, output, Choice(split=output.name), Console(quiet=True))

    return [
        view("select", "select", str(cache), "--every", "2"),
        view("filter", "filter", str(cache), "--tokens", "5:"),
        _after(split, view("merge", "merge", str(test), str(train))),
        _extend(root, whole, capture),
        _add_signal(root, whole),
        _export(root, cache),
        _import(root, cache, Path(capture["teacher"]["model"])),
    ]


def _after(make: Callable[[], object], scene: Scene) -> Scene:
    """Begin with what has to be there once."""
    made: list[bool] = []

    def prepare(output: Path) -> None:
        if not made:
            make()
            made.append(True)
        remove(output)

    return replace(scene, prepare=prepare)


def _extend(root: Path, whole: Scene, capture: dict[str, Any]) -> Scene:
    output, more = root / "views" / "longer", root / "more.jsonl"
    rows = make_rows(30, longest=12)
    write_rows(more, [*rows[:14], *rows[18:]])
    files = {**capture["data"]["files"], "train": str(more)}
    settings = {**capture, "data": {**capture["data"], "files": files}, "output": str(output)}
    file = root / "more.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return replace(
        whole,
        name="extend",
        output=output,
        command=["extend", str(whole.output), str(file), "--output", str(output)],
        treasures=lambda output: count_shards(output / "added"),
        promise=lambda output: promise_shards(output / "added"),
    )


def _add_signal(root: Path, whole: Scene) -> Scene:
    output = root / "views" / "deeper"
    return replace(
        whole,
        name="add-signal",
        output=output,
        command=["add-signal", str(whole.output), str(output), "--set", "hidden.layers=[1]"],
        treasures=lambda output: count_shards(output / "added"),
        promise=lambda output: promise_shards(output / "added"),
    )


def _export(root: Path, cache: Path) -> Scene:
    output = root / "exports"
    file = output / "plain.jsonl"
    return Scene(
        "export",
        output,
        ["export", str(cache), "--format", "jsonl", "--hidden", "--output", str(file)],
        content=read_cache_files,
        treasures=lambda output: {},
        promise=lambda output: "",
        stands="stands already; choose another --output",
    )


def _import(root: Path, cache: Path, tokenizer: Path) -> Scene:
    output, dump = root / "caches" / "imported", root / "dump" / "plain.jsonl"
    settings = {
        "output": str(output),
        "format": {"name": "stillroom"},
        "files": str(dump),
        "tokenizer": str(tokenizer),
        "teacher": {"model": "a teacher"},
        "shard_tokens": 100,
    }
    file = root / "import.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    scene = Scene(
        "import",
        output,
        ["import", str(file)],
        content=read_cache_files,
        treasures=count_shards,
        promise=lambda output: "",
        alone=True,
    )
    return _after(lambda: export_cache(cache, "jsonl", dump), scene)
