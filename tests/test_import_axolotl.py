"""Axolotl's distillation data, in each of its forms, belong to the tokens that they are about."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from small_dumps import Said, assert_says, import_files, say, write_lines

from pipeline.errors import ConfigError, DataError

K, PROMPT = 8, 5
TEXTS = [say(number) for number in range(4)]


def top(said: Said, row: int) -> list[dict[str, Any]]:
    return [{"token": f"token_id:{i}", "logprob": p} for i, p in said.top(K, row)]


def as_entries(said: Said) -> dict[str, Any]:
    """Lists for the tokens after the prompt: list j is about token PROMPT + j."""
    rows = range(PROMPT - 1, len(said.log_probs))
    return {"input_ids": said.tokens.tolist(), "logprobs": [top(said, row) for row in rows]}


def as_arrays(said: Said) -> dict[str, Any]:
    found = as_entries(said)
    lists = found["logprobs"]
    return {
        "input_ids": found["input_ids"],
        "target_token_ids": [[int(e["token"][9:]) for e in entries] for entries in lists],
        "logprobs": [[e["logprob"] for e in entries] for entries in lists],
    }


def as_prepared(said: Said, about: str) -> dict[str, Any]:
    """A list for each token, those of the prompt masked, probabilities divided by their sum."""
    rows = [t if about == "next" else t - 1 for t in range(len(said.tokens))]
    known = [PROMPT - 1 <= row < len(said.log_probs) for row in rows]
    lists = [said.top(K, row) if k else [] for row, k in zip(rows, known, strict=True)]
    sums = [np.log(sum(np.exp(p) for _, p in entries)) if entries else 0.0 for entries in lists]
    nothing = [-np.inf] * K
    return {
        "input_ids": said.tokens.tolist(),
        "target_token_ids": [[i for i, _ in e] if e else [*range(K)] for e in lists],
        "target_logprobs": [
            [p - s for _, p in e] if e else nothing for e, s in zip(lists, sums, strict=True)
        ],
        "target_mask": [[int(k)] * K for k in known],
    }


@pytest.mark.parametrize("form", [as_entries, as_arrays])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_are_about_the_last_tokens(tmp_path: Path, form: Any, ending: str) -> None:
    rows = [form(said) for said in TEXTS]
    file = tmp_path / f"dump.{ending}"
    if ending == "jsonl":
        write_lines(file, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    cache = import_files(tmp_path, "axolotl", str(file))
    for row, said in enumerate(TEXTS):
        assert_says(cache, row, said, K, 1e-5, first=PROMPT - 1)


def test_a_chat_is_read_by_the_template(tmp_path: Path) -> None:
    rows = []
    for said in TEXTS:
        lists = as_entries(said)["logprobs"]
        turns = [said.spell(0, PROMPT), said.spell(PROMPT)]
        rows.append({"talk": [{"role": "user", "content": turn} for turn in turns], "mine": lists})
    file = write_lines(tmp_path / "dump.jsonl", rows)
    format = {"name": "axolotl", "logprobs_field": "mine", "messages_field": "talk"}
    cache = import_files(tmp_path, format, file)
    assert_says(cache, 2, TEXTS[2], K, 1e-5, first=PROMPT - 1)


@pytest.mark.parametrize("about", ["own", "next"])
def test_prepared_data_have_no_tail_and_say_so(tmp_path: Path, about: str) -> None:
    file = write_lines(tmp_path / "dump.jsonl", [as_prepared(said, about) for said in TEXTS])
    cache = import_files(tmp_path, {"name": "axolotl", "about": about}, file)
    for row, said in enumerate(TEXTS):
        example = cache[row]
        assert example.target_positions.tolist() == [*range(PROMPT - 1, len(said.log_probs))]
        distribution = example.targets.at(1.0)
        assert float(distribution.tail_mass.max()) < 1e-5
        expected = np.array([p for _, p in said.top(K, PROMPT - 1)])
        expected -= np.log(np.exp(expected).sum())
        found = np.sort(distribution.log_probs[0].numpy())[::-1]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert cache.manifest.imported is not None
    assert cache.manifest.imported.tail == "none"


def test_prepared_data_of_the_token_beside_are_refused(tmp_path: Path) -> None:
    texts = [say(number, length=60, sharpness=6.0) for number in range(2)]
    file = write_lines(tmp_path / "dump.jsonl", [as_prepared(said, "own") for said in texts])
    with pytest.raises(DataError, match=r"row 0: its rows do not belong to its tokens: .* before"):
        import_files(tmp_path, {"name": "axolotl", "about": "next"}, file)


def test_prepared_data_must_be_told_what_they_are_about(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", [as_prepared(TEXTS[0], "own")])
    with pytest.raises(ConfigError, match=r"format\.about is missing"):
        import_files(tmp_path, "axolotl", file)


def test_lists_that_say_nothing_are_no_targets(tmp_path: Path) -> None:
    row = as_entries(TEXTS[0])
    row["logprobs"][0], row["logprobs"][3] = None, []
    cache = import_files(tmp_path, "axolotl", write_lines(tmp_path / "dump.jsonl", [row]))
    positions = cache[0].target_positions.tolist()
    assert positions == [p for p in range(PROMPT - 1, 23) if p not in (PROMPT - 1, PROMPT + 2)]


def test_another_temperature_is_marked_and_no_other_is_had(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dump.jsonl", [as_entries(said) for said in TEXTS])
    cache = import_files(tmp_path, {"name": "axolotl", "temperature": 2.0}, file)
    assert cache.manifest.imported is not None
    assert cache.manifest.imported.temperature == 2.0
    assert cache.manifest.targets.temperatures == (1.0,)
    with pytest.raises(ConfigError, match="exact targets at 1 only"):
        cache[0].targets.at(2.0)


def test_more_lists_than_tokens_are_refused(tmp_path: Path) -> None:
    row = as_entries(TEXTS[0])
    row["input_ids"] = row["input_ids"][:10]
    with pytest.raises(DataError, match="row 0: 19 lists for 10 tokens"):
        import_files(tmp_path, "axolotl", write_lines(tmp_path / "dump.jsonl", [row]))
