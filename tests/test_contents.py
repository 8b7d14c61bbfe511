"""The content of each row, in 16 bytes: what it depends on, and what it does not."""

import json
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cache_examples import make_draft, make_examples, write_cache, write_shards
from golden_cache import GOLDEN

from pipeline.cache import CacheWriter, TeacherCache, digest_set
from pipeline.errors import CacheError
from pipeline.identity import digest_example


def test_a_cache_knows_the_content_of_each_row(tmp_path: Path) -> None:
    draft = make_draft(11)
    write_cache(tmp_path, draft)
    cache = TeacherCache.open(tmp_path)
    expected = [digest_example(example) for example in make_examples(draft)]
    assert [cache.content(row) for row in range(11)] == expected
    assert cache.contents.shape == (11, 16)
    assert len(set(expected)) == 11
    assert [digest_example(cache[row]) for row in range(11)] == expected


def test_contents_are_read_as_the_format_describes_them(tmp_path: Path) -> None:
    write_cache(tmp_path, make_draft(6))
    example = TeacherCache.open(tmp_path)[4]
    names = ("input_ids", "segment_lengths", "target_positions", "label_ids")
    arrays = {name: getattr(example, name) for name in names}
    lengths = {name: len(array) for name, array in arrays.items()}
    told = [example.example_id, lengths, {"split": "train", "weight": 2.0}]
    header = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    numbers = b"".join(array.astype("<i4").tobytes() for array in arrays.values())
    spelled = len(header).to_bytes(8, "little") + header + numbers
    table = pa.ipc.open_file(tmp_path / "index" / "contents.arrow").read_all()
    assert table["content"][4].as_py() == blake2b(spelled, digest_size=16).digest()


def test_what_the_teacher_said_is_no_part_of_the_content(tmp_path: Path) -> None:
    draft = make_draft(8)
    write_cache(tmp_path / "one", draft)
    louder = [
        replace(e, targets=replace(e.targets, logits=2 * e.targets.logits))
        for e in make_examples(draft)
    ]
    write_cache(tmp_path / "other", draft, louder)
    one, other = (TeacherCache.open(tmp_path / name) for name in ("one", "other"))
    assert one.manifest.digest != other.manifest.digest
    assert np.array_equal(one.contents, other.contents)


def test_the_same_examples_in_another_order_are_the_same_set(tmp_path: Path) -> None:
    draft = make_draft(9)
    examples = make_examples(draft)
    write_cache(tmp_path / "one", draft, examples)
    write_cache(tmp_path / "other", draft, examples[::-1])
    one, other = (TeacherCache.open(tmp_path / name).contents for name in ("one", "other"))
    assert np.array_equal(one, other[::-1])
    assert digest_set(one) == digest_set(other)
    assert digest_set(one) != digest_set(one[1:])
    assert digest_set(one) != digest_set(np.concatenate([one, one[:1]]))


def test_an_absent_value_is_as_an_absent_column() -> None:
    example = make_examples(make_draft(1))[0]
    lacking = replace(example, columns={"split": "train"})
    null = replace(example, columns={"split": "train", "weight": None})
    assert digest_example(lacking) == digest_example(null) != digest_example(example)


def test_an_interrupted_cache_has_the_contents_of_every_row(tmp_path: Path) -> None:
    draft = make_draft(10)
    examples = make_examples(draft)
    write_shards(CacheWriter(tmp_path / "cache", draft), examples, [0, 2])
    continued = CacheWriter(tmp_path / "cache", draft)
    write_shards(continued, examples, [1])
    continued.finish()
    write_cache(tmp_path / "whole", draft)
    files = [
        (tmp_path / name / "index" / "contents.arrow").read_bytes() for name in ("cache", "whole")
    ]
    assert files[0] == files[1]


def test_a_cache_without_contents_is_asked_row_by_row() -> None:
    cache = TeacherCache.open(GOLDEN / "steps")
    assert not (GOLDEN / "steps" / "index" / "contents.arrow").exists()
    assert [cache.content(row) for row in range(len(cache))] == [
        digest_example(cache[row]) for row in range(len(cache))
    ]


def test_contents_of_another_cache_are_refused(tmp_path: Path) -> None:
    for count in (5, 6):
        write_cache(tmp_path / str(count), make_draft(count))
    name = Path("index") / "contents.arrow"
    (tmp_path / "5" / name).write_bytes((tmp_path / "6" / name).read_bytes())
    with pytest.raises(CacheError, match=r"contents\.arrow: has .* bytes, expected"):
        _ = TeacherCache.open(tmp_path / "5").contents
