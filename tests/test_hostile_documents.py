"""What strangers wrote into the JSON files of a cache ends in one line, or is in bounds."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from golden_cache import GOLDEN
from rich.console import Console

from pipeline.cache import TeacherCache
from pipeline.cache.documents import write_sealed
from pipeline.cache.manifest import read_shard
from pipeline.cache.names import require_inside
from pipeline.capture_log import CaptureLog
from pipeline.errors import CacheError, StillroomError
from pipeline.runs import read_result
from stages.inspect import inspect


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "hidden-int8", tmp_path / "copy"))


def change(file: Path, path: str, value: Any) -> None:
    """Set a value by its path."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    *parents, last = path.split("/")
    node = raw
    for part in parents:
        node = node[part]
    node[last] = value
    file.write_text(json.dumps(raw))


LUDICROUS = {
    "num_examples": 10**13,
    "shard_examples": 10**13,
    "num_classes": 10**12,
    "targets/top_k": 10**12,
    "targets/tail_draws": 10**12,
    "targets/temperatures": [1 + n / 10**5 for n in range(10**5)],
    "signals/pooled/width": 10**12,
    "signals/pooled/heads": 10**12,
    "signals/pooled/source_width": -1,
    "signals/..": {"width": 1},
    "signals/a%2Fb": {"width": 1},
    "label_names": ["a"],
    "task": {},
    "identity/data": {"digest": 3},
    "totals/bytes": -1,
    "totals/examples": 10**30,
    "num_examples ": 1.5,
}


@pytest.mark.parametrize("path", LUDICROUS)
def test_a_manifest_that_claims_the_impossible_is_refused(copy: Path, path: str) -> None:
    change(copy / "manifest.json", path.strip().replace("%2F", "\\"), LUDICROUS[path])
    with pytest.raises(CacheError, match=r"manifest\.json: .*the file is damaged") as caught:
        TeacherCache.open(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


CLIMBING = ["../x", "/etc/passwd", "a/../../x", "a//b", "./x", "", "a\\b", "C:x", "a\x00b"]
UNPRINTABLE = ["a\x1b[2J", "\u202ex", "x" * 300, "/".join("a" * 40)]


@pytest.mark.parametrize("name", [*CLIMBING, *UNPRINTABLE])
def test_a_name_that_climbs_or_is_none_is_refused(copy: Path, name: str) -> None:
    folder = copy / "shards" / "00000"
    change(folder / "shard.json", "files", {name: [1, "0"]})
    with pytest.raises(CacheError, match="no file below the folder"):
        read_shard(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"version": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"a": ' * 10**5 + "1" + "}" * 10**5,
        '{"identity": ' + '{"a":' * 40 + "1" + "}" * 41,
        '{"version": ' + "9" * 10**5 + "}",
        '{"task": "\\ud800"}',
        '{"\\ud800": 1}',
        '{"version": NaN}',
        "\ufeff{}",
    ],
    ids=range(8),
)
def test_json_that_nothing_can_hold_is_refused(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(CacheError) as caught:
        TeacherCache.open(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_json_of_gigabytes_is_not_read(copy: Path) -> None:
    with (copy / "manifest.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CacheError, match="1,099,511,627,776 bytes, at most"):
        TeacherCache.open(copy)


def test_a_link_that_leads_out_of_a_cache_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    root = tmp_path / "models" / "snapshots" / "abc"
    root.mkdir(parents=True)
    (tmp_path / "secret").write_text("mine")
    blob = tmp_path / "models" / "blobs" / "123"
    blob.parent.mkdir()
    blob.write_text("downloaded")
    for name, target in {"out": tmp_path / "secret", "hub": blob, "loop": root / "loop"}.items():
        (root / name).symlink_to(target)
    (root / "folder").symlink_to(tmp_path)
    (root / "own").write_text("own")
    require_inside(root, [root / "own", root / "hub"])
    for name in ("out", "folder/secret", "../../../secret"):
        with pytest.raises(CacheError, match="is a link that leads out of the cache"):
            require_inside(root, [root / name])
    with pytest.raises(CacheError, match="is a link to itself"):
        require_inside(root, [root / "loop"])


NASTY = "\x1b[2J\x07\x00\x9b\u202egnp<script>\"'&[red]"


def test_inspect_prints_no_text_of_a_cache_as_it_is(copy: Path) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    raw["identity"]["teacher"] = {"digest": NASTY, NASTY: NASTY, "name": NASTY}
    raw["task"] = {"name": NASTY, NASTY: [NASTY]}
    raw["label_names"] = [NASTY] * raw["num_classes"]
    (copy / "manifest.json").write_text(json.dumps(raw))
    (copy / "config.yaml").write_text(json.dumps({"teacher": {"model": NASTY}}))
    console = Console(file=StringIO(), width=200, force_terminal=False)
    inspect(copy, console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "U+001B" in printed and "U+202E" in printed
    assert all(line.isprintable() for line in printed.splitlines())


@pytest.mark.parametrize(
    "path", ["\x00", "http://169.254.169.254/", "simplecache::s3://x", "a\x1b[2J", "x" * 9999]
)
def test_a_view_names_folders_and_stores_alone(tmp_path: Path, path: str) -> None:
    source = {"path": path, "digest": "0" * 64}
    write_sealed(tmp_path / "view.json", {"version": 1, "parts": [source]})
    with pytest.raises(CacheError, match="is no folder and no store"):
        TeacherCache.open(tmp_path)


def test_a_view_of_itself_or_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    for content, match in (
        ({"version": 1, "parts": [{"path": ".", "digest": "0" * 64}]}, "is no cache"),
        ({"version": 2, "parts": []}, "install a newer Stillroom"),
        ({"version": 1, "requires": ["x"], "parts": []}, "install a newer Stillroom"),
    ):
        write_sealed(tmp_path / "view.json", content)
        with pytest.raises(CacheError, match=match):
            TeacherCache.open(tmp_path)


@pytest.mark.parametrize("damage", ["[]", "{", '{"version": 1}', '{"version": 1, "metrics": [3]}'])
def test_a_result_that_makes_no_sense_is_one_line(tmp_path: Path, damage: str) -> None:
    (tmp_path / "result.json").write_text(damage)
    with pytest.raises(StillroomError, match=r"result\.json: ") as caught:
        read_result(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '{"sessions": 3}', '{"sessions": [3]}', "{"])
def test_a_capture_log_that_makes_no_sense_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "capture.json").write_text(content)
    with pytest.raises(CacheError, match=r"capture\.json: "):
        CaptureLog.read(tmp_path / "capture.json")


def test_a_shard_of_a_newer_format_is_refused_with_what_to_do(copy: Path) -> None:
    change(copy / "shards" / "00000" / "shard.json", "requires", ["jars"])
    with pytest.raises(CacheError, match=r"requires jars, .*install a newer Stillroom"):
        read_shard(copy / "shards" / "00000")
