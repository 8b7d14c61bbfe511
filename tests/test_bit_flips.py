"""One wrong bit anywhere in a cache: found by verify, and never believed by whoever reads it.

STILLROOM_FLIPS=2000 makes as many trials of each test; a trial is its seed.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_examples import SIGNALS, make_draft, write_cache
from golden_cache import describe_example

from pipeline.cache import Draft, Signal, TargetsSpec, TeacherCache, read_bases, write_head
from pipeline.cache.verifying.whole import Depth, verify_cache
from pipeline.capture_log import CaptureLog
from pipeline.errors import CacheError
from pipeline.heads import OutputHead

TRIALS = int(os.environ.get("STILLROOM_FLIPS", "60"))
_PROJECTED = {
    "layer.1": Signal(
        width=2, dtype="int8", projection={"name": "pca", "width": 2}, source_width=6
    ),
    "layer.2": Signal(width=5, dtype="float8_e4m3fn"),
    "layer.3": Signal(width=5, dtype="bfloat16"),
}
_KEPT = {"top_k": 8, "tail_draws": 3, "temperatures": (1.0, 2.0)}
DRAFTS: dict[str, Draft] = {
    "lossless": make_draft(
        9, targets=TargetsSpec(**_KEPT, codec="lossless"), signals={**SIGNALS, **_PROJECTED}
    ),
    "steps": make_draft(9, targets=TargetsSpec(**_KEPT, codec="steps"), signals=_PROJECTED),
    "plain": make_draft(9, targets=TargetsSpec(top_k=4, codec="steps", compression="none")),
}


@pytest.fixture(scope="module", params=DRAFTS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache with one of every file that there is."""
    path: Path = tmp_path_factory.mktemp("caches") / request.param
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer/tokenizer.json").write_text('{"model": "words"}')
    (path / "config.yaml").write_text("seed: 0\n")
    write_head(path, OutputHead(torch.ones(50, 6), None, 1.0, None, 50))
    session = dict.fromkeys(("seconds", "forward_seconds", "tokens", "targets", "examples"), 1)
    names = dict.fromkeys(("bytes", "device", "dtype", "workers", "threads"), 1)
    CaptureLog(path / "capture.json", {}, [{**session, **names}]).save()
    write_cache(path, DRAFTS[request.param])
    return path


def damages(cache: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """A copy of the cache with one damage after the other, each undone, and the file that has it.

    Half of them are in a file picked by its size, half in any file.
    """
    copy = Path(shutil.copytree(cache, folder / "copy"))
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    for seed in range(TRIALS):
        rng = np.random.default_rng(seed)
        weights = sizes / sizes.sum() if seed % 2 else None
        file = files[rng.choice(len(files), p=weights)]
        good = file.read_bytes()
        bad = bytearray(good)
        place = int(rng.integers(len(bad)))
        if seed % 5:
            bad[place] ^= 1 << int(rng.integers(8))
        elif seed % 10:
            del bad[-1]
        else:
            del bad[place]
        file.write_bytes(bad)
        yield copy, file.relative_to(copy).as_posix()
        file.write_bytes(good)


def test_verify_misses_no_flipped_bit_and_no_lost_byte(cache: Path, tmp_path: Path) -> None:
    for copy, name in damages(cache, tmp_path):
        report = verify_cache(copy, Depth(decode=False, jobs=1))
        found = {finding.file: finding.shard for finding in report.harm}
        assert name in found
        if name.startswith("shards/"):
            assert found[name] == int(name.split("/")[1])
    assert verify_cache(tmp_path / "copy").findings == []


def read_everything(path: Path) -> Iterator[tuple[str, Any]]:
    """Whatever can be asked of a cache, each answer or the error in its place."""

    def ask(question: Any) -> Any:
        try:
            return question()
        except CacheError as error:
            return error

    cache = ask(lambda: TeacherCache.open(path))
    if isinstance(cache, CacheError):
        yield "manifest.json", cache
        return
    for row in range(9):
        yield f"row {row}", ask(lambda row=row: describe_example(cache[row]))
        yield f"id {row}", ask(lambda row=row: cache.by_id(f"text-{row}").example_id)
    yield "ids", ask(lambda: list(cache.ids()))
    yield "content", ask(lambda: [cache.content(row) for row in range(9)])
    for split in ("train", "test"):
        yield split, ask(lambda split=split: cache.split_indices(split).tolist())
    for column in cache.manifest.columns:
        groups = ask(lambda column=column: cache.group(column))
        known = not isinstance(groups, CacheError)
        yield column, {n: r.tolist() for n, r in groups.items()} if known else groups
    files = ask(lambda: sorted(file.read_text() for file in cache.tokenizer_path.iterdir()))
    yield "tokenizer", files
    yield "head", ask(lambda: cache.read_head()(torch.ones(1, 6)).tolist())
    if cache.manifest.projections:
        bases = ask(lambda: read_bases(path, cache.manifest.projections))
        known = not isinstance(bases, CacheError)
        yield "bases", {n: b.mean.tolist() for n, b in bases.items()} if known else bases


def test_a_flipped_bit_is_never_believed_by_whoever_reads_it(cache: Path, tmp_path: Path) -> None:
    expected = dict(read_everything(cache))
    assert not any(isinstance(answer, CacheError) for answer in expected.values())
    refused = 0
    for copy, name in damages(cache, tmp_path):
        answers = dict(read_everything(copy))
        for question, answer in answers.items():
            if isinstance(answer, CacheError):
                refused += 1
                assert "\n" not in str(answer)
                place = "/".join(name.split("/")[:2]) if name.startswith("shards/") else name
                assert place in str(answer), question
            else:
                assert answer == expected[question], f"{question} after damage to {name}"
    assert refused > TRIALS
