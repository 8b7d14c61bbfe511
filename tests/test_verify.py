"""`stillroom verify` finds every flipped bit, and mends what can be mended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_examples import SIGNALS, make_draft, make_examples, write_cache, write_shards
from golden_cache import CASES, GOLDEN
from small_teachers import read_files
from typer.testing import CliRunner

from pipeline.cache import CacheWriter, Signal, TeacherCache
from pipeline.cache.documents import write_sealed
from pipeline.cache.verifying.findings import Report
from pipeline.cache.verifying.repairing import repair_cache
from pipeline.cache.verifying.whole import Depth, verify_cache
from pipeline.errors import CacheError
from stages.cli import app

PROJECTED = Signal(width=2, projection={"name": "pca", "width": 2}, source_width=6)
DRAFT = make_draft(14, signals={**SIGNALS, "layer.1": PROJECTED})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "whole"
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer/tokenizer.json").write_text('{"model": "words"}')
    write_cache(path, DRAFT)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A cache to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flip(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


def told(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("depth", [Depth(), Depth(sample=3)])
def test_caches_of_every_codec_and_dtype_are_whole(name: str, depth: Depth) -> None:
    report = verify_cache(GOLDEN / name, depth)
    assert (report.state, told(report)) == ("whole", [])
    assert report.checked > 0


def test_a_whole_cache_has_nothing_to_mend(copy: Path, whole: Path) -> None:
    report = verify_cache(copy)
    assert (report.state, report.checked, report.shards) == ("whole", 14, 4)
    assert repair_cache(copy, report) == []
    assert read_files(copy) == read_files(whole)


def test_what_is_no_cache_is_told_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is no cache"):
        verify_cache(tmp_path)


def test_damage_is_told_with_its_shard_and_record_batch_or_signal(copy: Path) -> None:
    info = json.loads((copy / "shards/00001/shard.json").read_text())
    _, start, size, _ = info["batches"][0]
    rows = copy / "shards/00001/rows.arrow"
    content = bytearray(rows.read_bytes())
    content[start + size * 4 // 5] ^= 1  # the schema and the message are the first half
    rows.write_bytes(content)
    vectors = copy / "shards/00002/hidden.zarr/layer.0/c/0/0"
    vectors.write_bytes(vectors.read_bytes()[:-1])
    (copy / "shards/00003/hidden.zarr/pooled/zarr.json").unlink()
    report = verify_cache(copy)
    assert report.damaged_shards == [1, 2, 3]
    assert told(report) == [
        "shards/00001/rows.arrow: fails its checksum; record batch 0; column targets",
        f"shards/00002/hidden.zarr/layer.0/c/0/0: has {vectors.stat().st_size:,} bytes, expected"
        f" {vectors.stat().st_size + 1:,}; signal layer.0",
        "shards/00003/hidden.zarr/pooled/zarr.json: is missing",
    ]
    assert [finding.kind for finding in report.findings] == ["damage", "damage", "hole"]


def test_files_that_belong_to_nothing_are_told_and_only_a_repair_removes_them(
    copy: Path, whole: Path
) -> None:
    strangers = ["shards/00001/hidden.zarr/x", "shards/99/rows.arrow", "index/old.arrow"]
    for name in [*strangers, "tokenizer/vocab.txt", "examples.arrow"]:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    report = verify_cache(copy)
    assert report.state == "whole"
    assert {finding.kind for finding in report.findings} == {"orphan"}
    assert len(report.findings) == 5
    repair_cache(copy, report)
    assert told(verify_cache(copy)) == []
    assert sorted(copy.rglob("*")) == sorted(copy / f.relative_to(whole) for f in whole.rglob("*"))


def change_shard(copy: Path, index: int, **changes: object) -> None:
    """Rewrite a shard.json with its checksum, and the index and manifest for it."""
    file = copy / f"shards/{index:05d}/shard.json"
    raw = json.loads(file.read_text())
    write_sealed(file, {**raw, **changes})
    raw = json.loads((copy / "manifest.json").read_text())
    draft = {name: raw[name] for name in type(DRAFT).model_fields if name in raw}
    write_sealed(copy / "draft.json", draft)
    (copy / "manifest.json").unlink()
    CacheWriter(copy, DRAFT).finish()


@pytest.mark.parametrize("name", ["targets", "tokens"])
def test_wrong_counts_are_told_though_every_checksum_is_right(copy: Path, name: str) -> None:
    change_shard(copy, 2, **{name: 1})
    (finding,) = verify_cache(copy).findings
    assert finding.kind == "count"
    assert str(finding).startswith(f"shards/00002/shard.json: says {name} 1, expected ")
    assert verify_cache(copy, Depth(decode=False)).state == "whole"


def test_a_sample_tells_of_a_damaged_batch_once(copy: Path) -> None:
    rows = copy / "shards/00001/rows.arrow"
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1  # in the batch, not in the footer, which no reader asks
    rows.write_bytes(content)
    (found,) = told(verify_cache(copy, Depth(sample=1000)))
    assert found.startswith("shards/00001: ") and found.endswith(" checksum)")
    with pytest.raises(CacheError, match="mend it with `stillroom verify --repair` or copy it"):
        list(TeacherCache.open(copy).stream(seed=0, epoch=0))


def test_an_index_that_does_not_fit_the_shards_is_told_and_made_anew(
    copy: Path, whole: Path
) -> None:
    write_cache(copy.with_name("other"), DRAFT, make_examples(DRAFT)[::-1])
    shutil.copyfile(copy.with_name("other") / "index/ids.arrow", copy / "index/ids.arrow")
    assert told(verify_cache(copy)) == ["index/ids.arrow: fails its checksum"]
    sealed = (copy / "manifest.json").read_bytes()
    raw = json.loads(sealed)
    write_sealed(copy / "manifest.json", {key: raw[key] for key in raw if key != "files"})
    assert told(verify_cache(copy)) == ["index/ids.arrow: differs from what the shards hold"]
    sampled = verify_cache(copy, Depth(sample=5))
    assert {finding.kind for finding in sampled.findings} == {"index"}
    (copy / "manifest.json").write_bytes(sealed)
    repair_cache(copy, verify_cache(copy))
    assert read_files(copy) == read_files(whole)


def test_an_unfinished_cache_says_what_stands(tmp_path: Path) -> None:
    write_shards(CacheWriter(tmp_path, DRAFT), make_examples(DRAFT), [0, 2])
    report = verify_cache(tmp_path)
    assert (report.state, report.pending, report.checked) == ("unfinished", [1, 3], 8)
    flip(tmp_path / "shards/00002/shard.json", np.random.default_rng(0))
    report = verify_cache(tmp_path)
    assert (report.state, report.damaged_shards) == ("damaged", [2])
    repair_cache(tmp_path, report)
    assert CacheWriter(tmp_path, DRAFT).finished == {0}


def test_projections_of_an_unfinished_cache_are_compared_with_its_shards(
    whole: Path, tmp_path: Path
) -> None:
    write_shards(CacheWriter(tmp_path, DRAFT), make_examples(DRAFT), [0, 1])
    good = (tmp_path / "projections.safetensors").read_bytes()
    (tmp_path / "projections.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    report = verify_cache(tmp_path)
    assert told(report) == ["projections.safetensors: is not what the shards were projected with"]
    assert CacheWriter(tmp_path, DRAFT).finished == set()  # by itself too
    write_cache(tmp_path, DRAFT)
    assert (tmp_path / "projections.safetensors").read_bytes() == good
    shards = [path.relative_to(whole) for path in whole.glob("shards/*/shard.json")]
    assert all((tmp_path / name).read_bytes() == (whole / name).read_bytes() for name in shards)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one shard": lambda copy: flip(copy / "shards/00001/rows.arrow", np.random.default_rng(0)),
    "the last shard": lambda copy: shutil.rmtree(copy / "shards/00003"),
    "two shards": lambda copy: [
        (copy / f"shards/0000{n}/hidden.zarr/layer.0/c/0/0").unlink() for n in (0, 2)
    ],
    "a shard.json": lambda copy: flip(copy / "shards/00000/shard.json", np.random.default_rng(1)),
    "the index": lambda copy: shutil.rmtree(copy / "index"),
    "the manifest": lambda copy: flip(copy / "manifest.json", np.random.default_rng(2)),
    "the manifest, gone": lambda copy: (copy / "manifest.json").unlink(),
    "manifest and shard": lambda copy: [
        flip(copy / name, np.random.default_rng(3))
        for name in ("manifest.json", "shards/00002/rows.arrow")
    ],
    "projections": lambda copy: flip(copy / "projections.safetensors", np.random.default_rng(4)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_repaired_cache_is_continued_to_the_same_bytes(
    copy: Path, whole: Path, damage: str
) -> None:
    DAMAGES[damage](copy)
    report = verify_cache(copy)
    assert report.state == "damaged"
    repair_cache(copy, report)
    again = set(range(4)) - CacheWriter(copy, DRAFT).finished
    assert again == (set(range(4)) if damage == "projections" else set(report.damaged_shards))
    write_cache(copy, DRAFT)
    assert told(verify_cache(copy)) == []
    assert read_files(copy) == read_files(whole)


@pytest.mark.parametrize("done", range(4))
def test_a_repair_that_was_killed_is_made_good_by_the_next(
    copy: Path, whole: Path, tmp_path: Path, done: int
) -> None:
    """Its steps in order: draft.json written, a shard.json removed, the other, manifest.json."""
    for index in (1, 3):
        flip(copy / f"shards/0000{index}/rows.arrow", np.random.default_rng(index))
    mended = Path(shutil.copytree(copy, tmp_path / "mended"))
    repair_cache(mended, verify_cache(mended))
    shutil.copyfile(mended / "draft.json", copy / "draft.json")
    for index in (1, 3)[:done]:
        (copy / f"shards/0000{index}/shard.json").unlink()
    if done == 3:
        (copy / "manifest.json").unlink()
    repair_cache(copy, verify_cache(copy))
    assert CacheWriter(copy, DRAFT).finished == {0, 2}
    write_cache(copy, DRAFT)
    assert verify_cache(copy).findings == []
    assert read_files(copy) == read_files(whole)


def test_shards_of_other_settings_are_not_adopted_where_the_draft_is_lost(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match="written for other settings"):
        CacheWriter(copy, make_draft(14))


def test_the_command_tells_machines_too_and_exits_by_what_it_found(copy: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["verify", str(copy)]).exit_code == 0
    view = copy.with_name("view")
    assert run(app, ["select", str(copy), str(view), "--first", "2"]).exit_code == 0
    flip(copy / "shards/00001/rows.arrow", np.random.default_rng(0))
    found = run(app, ["verify", str(copy), "--json"])
    assert found.exit_code == 4
    raw = json.loads(found.stdout)
    assert (raw["state"], raw["exit_code"], raw["damaged_shards"]) == ("damaged", 4, [1])
    seen = run(app, ["verify", str(view), "--json"])
    assert (seen.exit_code, json.loads(seen.stdout)["exit_code"]) == (4, 4)
    assert raw["findings"][0]["file"] == "shards/00001/rows.arrow"
    found = run(app, ["verify", str(copy), "--repair"])
    assert found.exit_code == 3 and "shards/00001: queued again" in found.stdout
    assert run(app, ["verify", str(copy)]).exit_code == 3
    assert "3 of 4 shards stand and are sound" in run(app, ["verify", str(copy)]).stdout
