"""A dump that is none is refused with its row and the reason, before a shard is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from small_dumps import V, import_files, save_tokenizer, say, write_lines

from pipeline.cache import TeacherCache
from pipeline.config import parse_config
from pipeline.errors import ConfigError, DataError, ModelError, StillroomError
from stages.import_dump import import_dump
from stages.import_reading import ImportConfig

K = 8
Row = dict[str, Any]


def make_rows(count: int = 3, **changes: Any) -> list[Row]:
    """Rows in axolotl's arrays, all tokens but the first with a list."""
    rows = []
    for number in range(count):
        said = say(number, **changes)
        tops = [said.top(K, row) for row in range(len(said.log_probs))]
        rows.append(
            {
                "input_ids": said.tokens.tolist(),
                "target_token_ids": [[i for i, _ in top] for top in tops],
                "logprobs": [[p for _, p in top] for top in tops],
            }
        )
    return rows


def nan(row: Row) -> None:
    row["logprobs"][4][2] = float("nan")


def logits(row: Row) -> None:
    row["logprobs"][4][0] = 3.5


def common_logarithms(row: Row) -> None:
    row["logprobs"] = [[p / 2.302585 for p in values] for values in row["logprobs"]]


def twice(row: Row) -> None:
    row["target_token_ids"][4][1] = row["target_token_ids"][4][0]


def large_class(row: Row) -> None:
    row["target_token_ids"][4][1] = V


def large_token(row: Row) -> None:
    row["input_ids"][3] = V + 7


def negative_class(row: Row) -> None:
    row["target_token_ids"][4][1] = -1


def torn(row: Row) -> None:
    row["logprobs"][4].pop()


def broken_text(row: Row) -> None:
    row["input_ids"] = "abc"


def fractions(row: Row) -> None:
    row["target_token_ids"][4][1] = 0.5


def no_tokens(row: Row) -> None:
    row["input_ids"], row["logprobs"], row["target_token_ids"] = [], [], []


WRONG: list[tuple[Callable[[Row], None], str]] = [
    (nan, "NaN"),
    (logits, r"log-probability of 3\.5, expected at most 0"),
    (common_logarithms, r"add up to .*, expected at most 1"),
    (twice, "row 4 holds a class twice"),
    (large_class, "class 300, the tokenizer has 300"),
    (large_token, "token 307, the tokenizer has 300"),
    (negative_class, "class -1, the tokenizer has 300"),
    (torn, "rows of different lengths"),
    (broken_text, "expected a list of numbers"),
    (fractions, "expected whole numbers"),
    (no_tokens, "holds no tokens"),
]


@pytest.mark.parametrize(("spoil", "reason"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_a_row_that_is_no_answer_is_named(
    tmp_path: Path, spoil: Callable[[Row], None], reason: str
) -> None:
    rows = make_rows()
    spoil(rows[1])
    file = write_lines(tmp_path / "dump.jsonl", rows)
    with pytest.raises(DataError, match=rf"dump\.jsonl: row 1: .*{reason}") as caught:
        import_files(tmp_path, "axolotl", file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "shards").exists()
    assert not [*(tmp_path / "cache").rglob("*.arrow")]


@pytest.mark.parametrize(("shift", "side"), [(1, "after"), (-1, "before")])
def test_rows_that_belong_to_the_token_beside_are_refused(
    tmp_path: Path, shift: int, side: str
) -> None:
    rows = make_rows(2, length=60, sharpness=6.0)
    moved = slice(shift, None) if shift > 0 else slice(None, shift)
    for name in ("target_token_ids", "logprobs"):
        kept = rows[1][name][moved]
        rows[1][name] = [*kept, kept[-1]] if shift > 0 else [kept[0], *kept]
    file = write_lines(tmp_path / "dump.jsonl", rows)
    with pytest.raises(DataError, match=rf"row 1: its rows do not belong .* one {side} it"):
        import_files(tmp_path, "axolotl", file)


def test_rows_of_another_text_are_told_by_how_few_labels_they_hold(tmp_path: Path) -> None:
    rows = make_rows(2)
    rows[0]["input_ids"], rows[1]["input_ids"] = rows[1]["input_ids"], rows[0]["input_ids"]
    cache = import_files(tmp_path, "axolotl", write_lines(tmp_path / "dump.jsonl", rows))
    assert cache.manifest.imported is not None
    found = cache.manifest.imported.rows
    assert found["labels_bounded"] == found["labels"] - found.get("labels_kept", 0)
    assert found["labels_bounded"] > 0.8 * found["labels"]


def test_rounding_above_one_is_taken_away_and_counted(tmp_path: Path) -> None:
    rows = make_rows()
    rows[1]["logprobs"][4] = [-2.05] * K  # which add up to 1.03
    cache = import_files(tmp_path, "axolotl", write_lines(tmp_path / "dump.jsonl", rows))
    distribution = cache[1].targets.at(1.0)
    assert float(distribution.log_probs[4].exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert cache.manifest.imported is not None
    found = cache.manifest.imported.rows
    assert (found["scaled"], found["excess"]) == (1, 0.03)


LINES = [
    ("not json\n", "line 1 is no JSON"),
    ("[1, 2]\n", "line 1 holds list, expected an object"),
    ('{"input_ids": [1, 2]}\n', "row 0: has no 'logprobs' among input_ids; give the format"),
]


@pytest.mark.parametrize(("content", "reason"), LINES, ids=["text", "list", "fields"])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "dump.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        import_files(tmp_path, "axolotl", str(tmp_path / "dump.jsonl"))


def test_half_a_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dump.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"dump\.parquet: cannot be read"):
        import_files(tmp_path, "axolotl", str(tmp_path / "dump.parquet"))


SETTINGS: list[tuple[dict[str, Any], type[StillroomError], str]] = [
    ({"files": "nothing-*.jsonl"}, DataError, "finds nothing"),
    ({"format": "axolotel"}, ConfigError, "did you mean 'axolotl'"),
    ({"format": {"name": "axolotl", "abuot": "own"}}, ConfigError, "did you mean 'about'"),
    ({"tokenizer": "./nowhere"}, ModelError, "no such folder"),
    ({"top_k": K + 1}, ConfigError, "top_k: 9, but the dump has rows of 8 to 8 entries"),
    ({"carry": ["language"]}, DataError, "row 0: has no 'language' among .*; see to carry"),
]


@pytest.mark.parametrize(("changes", "kind", "reason"), SETTINGS, ids=lambda value: str(value)[:20])
def test_settings_that_do_not_fit_the_dump_are_named(
    tmp_path: Path, changes: dict[str, Any], kind: type[StillroomError], reason: str
) -> None:
    file = write_lines(tmp_path / "dump.jsonl", make_rows())
    settings = {"format": "axolotl", "files": file, **changes}
    with pytest.raises(kind, match=reason):
        import_files(tmp_path, settings.pop("format"), settings.pop("files"), **settings)


def mute(row: Row) -> Row:
    """A text that the teacher said nothing about."""
    return {"input_ids": row["input_ids"], "logprobs": [], "target_token_ids": []}


def test_a_dump_in_which_nothing_is_said_is_refused(tmp_path: Path) -> None:
    for rows, found in (
        ([], "files: hold no rows, expected log-probabilities as axolotl has them"),
        ([mute(row) for row in make_rows(2)], "files: hold 2 texts without one distribution"),
    ):
        with pytest.raises(DataError, match=found):
            import_files(tmp_path, "axolotl", write_lines(tmp_path / "dump.jsonl", rows))
        assert not (tmp_path / "cache" / "shards").exists()


def test_texts_about_which_nothing_is_said_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = make_rows(3)
    settings = {
        "output": str(tmp_path / "cache"),
        "format": "axolotl",
        "files": write_lines(tmp_path / "dump.jsonl", [one, mute(two), three]),
        "tokenizer": save_tokenizer(tmp_path / "tokenizer"),
        "teacher": {"model": "somebody/teacher"},
    }
    cache = TeacherCache.open(import_dump(parse_config(ImportConfig, settings, "the import")))
    assert [len(example.targets) for example in map(cache.__getitem__, range(3))] == [23, 0, 23]
    assert cache.manifest.imported is not None
    assert cache.manifest.imported.rows["unanswered"] == 1
    assert "3 examples (1 of them without a target), 46 targets" in capsys.readouterr().out


def test_a_null_is_no_id_and_no_row(tmp_path: Path) -> None:
    rows = [{**row, "name": name} for row, name in zip(make_rows(2), ("a", None), strict=True)]
    named = {"name": "axolotl", "id_field": "name"}
    with pytest.raises(DataError, match="row 1: has a null in 'name'; name a field that all rows"):
        import_files(tmp_path, named, write_lines(tmp_path / "dump.jsonl", rows))
    plain = {"input_ids": rows[0]["input_ids"], "token_ids": rows[0]["target_token_ids"]}
    file = str(tmp_path / "dump.parquet")
    parquet.write_table(pa.Table.from_pylist([{**plain, "top_values": None}]), file)
    with pytest.raises(DataError, match="row 0: has a null in 'top_values'; leave it out"):
        import_files(tmp_path, "distillkit", file)
