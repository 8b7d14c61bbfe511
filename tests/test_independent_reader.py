"""data/README.md is enough: a reader written from it alone decodes what Stillroom decodes."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_reader
import numpy as np
import pytest
from cache_examples import make_draft, make_examples, write_cache
from golden_cache import CASES, GOLDEN, describe_example
from independent_reader import Cache, read_safetensors

from pipeline.cache import Signal, TargetsSpec, TeacherCache, read_bases
from pipeline.errors import CacheError

_ROUNDED = {"logits"}  # a logarithm rounds differently in two libraries; all else is exact


def require_same_reading(folder: Path) -> None:
    cache, own = Cache(folder), TeacherCache.open(folder)
    assert len(cache) == len(own) > 0
    targets, classes = cache.manifest["targets"], cache.manifest["num_classes"]
    for row in range(len(cache)):
        wanted, found = describe_example(own[row]), cache[row]
        found |= {"temperatures": targets["temperatures"], "num_classes": classes}
        for whole in (wanted, found):
            whole |= {f"hidden {name}": values for name, values in whole.pop("hidden").items()}
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            plain = found[key].tolist() if isinstance(found[key], np.ndarray) else found[key]
            if key in _ROUNDED:
                np.testing.assert_allclose(plain, value, rtol=1e-6, atol=1e-6, err_msg=key)
            else:
                assert plain == value, key
        assert cache.find(wanted["example_id"]) == row
    with pytest.raises(KeyError):
        cache.find("no such id")


@pytest.mark.parametrize("name", CASES)
def test_a_reader_written_from_the_page_reads_the_golden_caches(name: str) -> None:
    require_same_reading(GOLDEN / name)
    cache, own = Cache(GOLDEN / name), TeacherCache.open(GOLDEN / name)
    for split in ("train", "test"):
        found = [row for row in range(len(own)) if own[row].columns["split"] == split]
        assert cache.rows_where("split", split) == own.split_indices(split).tolist() == found


def test_it_reads_what_the_golden_caches_lack(tmp_path: Path) -> None:
    types = {"split": "string", "size": "int64", "fine": "bool", "words": "strings"}
    signals = {"layer.1": Signal(width=3, dtype="bfloat16")}
    draft = make_draft(
        9,
        targets=TargetsSpec(top_k=1, tail_draws=1, temperatures=(0.5, 2.0), codec="steps"),
        num_classes=257,
        columns=types,
        signals=signals,
        positions="last",
        shard_examples=6,
    )
    rows = [
        {"split": None, "size": row % 2 * 2**40, "fine": row > 3 or None, "words": ["é", ""] * row}
        for row in range(9)
    ]
    pairs = zip(make_examples(draft), rows, strict=True)
    write_cache(tmp_path, draft, [replace(example, columns=row) for example, row in pairs])
    require_same_reading(tmp_path)
    cache, own = Cache(tmp_path), TeacherCache.open(tmp_path)
    for column in ("size", "fine"):
        for value, found in own.group(column).items():
            assert cache.rows_where(column, value) == found.tolist()


def test_it_reads_projections() -> None:
    folder = GOLDEN / "hidden-projected"
    own = read_bases(folder, TeacherCache.open(folder).manifest.projections or "")
    found = read_safetensors(folder / "projections.safetensors")
    for signal, basis in own.items():
        for part, tensor in vars(basis).items():
            np.testing.assert_array_equal(found[f"{signal}.{part}"], tensor.numpy())


def test_it_knows_the_page_alone_and_is_short() -> None:
    text = Path(independent_reader.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    froms = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | set(froms)
    allowed = {"hashlib", "json", "pathlib", "typing", "numpy", "numpy.typing", "pyarrow", "zarr"}
    assert names <= allowed


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "steps", tmp_path / "copy"))


def test_a_key_that_came_later_is_passed_over(copy: Path) -> None:
    digest = TeacherCache.open(copy).manifest.digest
    change_json(copy / "manifest.json", colour={"of": ["jars"]}, requires=[])
    assert TeacherCache.open(copy).manifest.digest == digest
    require_same_reading(copy)


@pytest.mark.parametrize("changes", [{"version": 2}, {"requires": ["jars"]}, {"requires": "jars"}])
def test_what_a_newer_stillroom_wrote_is_refused_with_what_to_do(copy: Path, changes: Any) -> None:
    change_json(copy / "manifest.json", **changes)
    with pytest.raises(CacheError, match=r"manifest\.json: .*; install a newer Stillroom, or"):
        TeacherCache.open(copy)
    with pytest.raises(AssertionError, match="needs a newer reader"):
        Cache(copy)


@pytest.mark.parametrize("within", ["targets", "codec"])
def test_a_key_below_the_top_is_refused_because_numbers_may_hang_on_it(
    copy: Path, within: str
) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    (raw["targets"]["codec"] if within == "codec" else raw["targets"])["scale"] = 2
    change_json(copy / "manifest.json", **raw)
    with pytest.raises(CacheError, match="unknown key"):
        TeacherCache.open(copy)
