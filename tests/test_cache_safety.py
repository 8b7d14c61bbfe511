"""Crashes, full disks and other inputs cost at most the shards under way."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from cache_examples import (
    SIGNALS,
    assert_same,
    make_draft,
    make_example,
    make_examples,
    write_cache,
    write_shards,
)

from pipeline.cache import CacheWriter, Draft, TargetsSpec, TeacherCache
from pipeline.errors import CacheError, DataError, MismatchError

DRAFT = make_draft(10, signals=SIGNALS)


def read_files(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "whole"
    write_cache(path, DRAFT)
    return path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A cache to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_the_same_inputs_give_the_same_bytes(whole, tmp_path):
    write_cache(tmp_path / "again", DRAFT)
    assert read_files(tmp_path / "again") == read_files(whole)
    assert TeacherCache.open(tmp_path / "again").manifest.digest == (
        TeacherCache.open(whole).manifest.digest
    )


def test_an_interrupted_shard_is_invisible_and_done_again(whole, tmp_path):
    examples = make_examples(DRAFT)
    writer = CacheWriter(tmp_path, DRAFT)
    write_shards(writer, examples, [2])
    with pytest.raises(KeyboardInterrupt), writer.shard(1) as shard:
        shard.add(examples[4])
        raise KeyboardInterrupt
    with pytest.raises(CacheError, match=r"1 of 3 shards stand;.*again to continue"):
        TeacherCache.open(tmp_path)
    with pytest.raises(CacheError, match="2 of 3 shards are missing, the first is 0"):
        writer.finish()
    again = CacheWriter(tmp_path, DRAFT)
    assert again.finished == {2}
    assert again.bytes_written > 0
    write_shards(again, examples, [0, 1])
    again.finish()
    assert read_files(tmp_path) == read_files(whole)


def write_until_killed(path: Path) -> None:
    examples = make_examples(DRAFT)
    writer = CacheWriter(path, DRAFT)
    write_shards(writer, examples, [0])
    with writer.shard(1) as shard:
        for example in examples[4:7]:
            shard.add(example)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_capture_loses_only_the_shard_under_way(whole, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=write_until_killed, args=(tmp_path,)
    )
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("drafts/00001.*/rows.arrow"))) == 1
    assert not (tmp_path / "shards/00001").exists()
    writer = CacheWriter(tmp_path, DRAFT)
    assert writer.finished == {0}
    write_shards(writer, make_examples(DRAFT), [1, 2])
    writer.finish()
    assert read_files(tmp_path) == read_files(whole)


def test_a_cache_whose_folder_vanished_is_never_whole(tmp_path):
    writer = CacheWriter(tmp_path, DRAFT)
    write_shards(writer, make_examples(DRAFT), [0, 1, 2])
    (tmp_path / "draft.json").unlink()  # as with all that stood there
    with pytest.raises(FileNotFoundError, match=r"draft\.json"):
        writer.finish()
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_stops_and_says_what_is_safe(tmp_path):
    writer = CacheWriter(tmp_path, DRAFT)
    examples = make_examples(DRAFT)
    write_shards(writer, examples, [0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CacheError, match=r"cannot be written .*1 of 3 shards are safe"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
            write_shards(writer, examples, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert writer.finished == {0}
    write_cache(tmp_path, DRAFT)
    assert_same(TeacherCache.open(tmp_path)[5], make_example(5, DRAFT))


def test_a_finished_cache_is_not_written_again(copy):
    before = read_files(copy)
    writer = CacheWriter(copy, DRAFT)
    assert writer.finished == {0, 1, 2}
    with pytest.raises(ValueError, match="shard 1 is finished"), writer.shard(1):
        pass
    assert writer.finish() == TeacherCache.open(copy).manifest
    assert read_files(copy) == before


def test_a_shard_with_a_file_cut_short_is_done_again(copy):
    (copy / "manifest.json").rename(copy / "draft.json")
    raw = json.loads((copy / "draft.json").read_text())
    draft = {key: raw[key] for key in raw if key in Draft.model_fields}
    (copy / "draft.json").write_text(json.dumps(draft))
    rows = copy / "shards/00001/rows.arrow"
    rows.write_bytes(rows.read_bytes()[:-1])
    assert CacheWriter(copy, DRAFT).finished == {0, 2}


@pytest.mark.parametrize("finished", [True, False])
def test_another_draft_is_refused_with_the_fields(tmp_path, finished):
    if finished:
        write_cache(tmp_path, DRAFT)
    else:
        CacheWriter(tmp_path, DRAFT)
    tokenizer = {"digest": "ab" * 32, "size": 9}
    identity = DRAFT.identity.model_copy(update={"tokenizer": tokenizer})
    targets = TargetsSpec(top_k=9, temperatures=(2.0,), codec="lossless")
    other = make_draft(10, signals=SIGNALS, identity=identity, targets=targets)
    with pytest.raises(MismatchError) as caught:
        CacheWriter(tmp_path, other)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: cached with ")
    assert "targets.top_k 8, asked for 9" in message
    assert "identity.tokenizer.digest tokenizer-digest, asked for abababab…" in message
    assert "identity.tokenizer.size null, asked for 9" in message
    assert message.endswith(
        "Cache the teacher again into another folder, or go back to those settings"
    )
    assert "\n" not in message


def test_an_id_that_stands_twice_is_named(tmp_path):
    examples = make_examples(DRAFT)
    examples[7] = replace(examples[7], example_id="text-2")
    with pytest.raises(DataError, match="'text-2': stands twice, in rows 2 and 7"):
        write_cache(tmp_path, DRAFT, examples)
    with pytest.raises(CacheError, match="3 of 3 shards stand"):
        TeacherCache.open(tmp_path)


def test_a_shard_with_too_few_examples_does_not_stand(tmp_path):
    with pytest.raises(CacheError, match="1 examples were added, expected 2"):
        write_cache(tmp_path, DRAFT, make_examples(DRAFT)[:9])
    assert CacheWriter(tmp_path, DRAFT).finished == {0, 1}


def test_no_examples_make_no_cache(tmp_path):
    with pytest.raises(DataError, match="no examples"):
        CacheWriter(tmp_path, make_draft(0))


def test_shards_of_unknown_origin_are_not_adopted(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"neither draft\.json nor manifest\.json"):
        CacheWriter(copy, make_draft(9, signals=SIGNALS))
