"""DistillKit's captures, packed here by its definition, become the distributions that they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from small_dumps import Said, V, assert_says, import_files, save_tokenizer, say

from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.exchange.distillkit import Compression
from pipeline.targets import UNLABELLED

K = 12
EXACT = {"d": V, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers end to end, the highest bit first, filled up with zeros to whole bytes."""
    text = ["".join(format(int(n), f"0{bits}b") for n in row) for row in numbers]
    padded = [row.ljust(-(-len(row) // 8) * 8, "0") for row in text]
    return np.array(
        [[int(row[i : i + 8], 2) for i in range(0, len(row), 8)] for row in padded], dtype=np.uint8
    )


def as_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    found = torch.from_numpy(values).to(DTYPES[dtype]).contiguous()
    return found.view(torch.uint8).reshape(len(values), -1).numpy()


def compress(log_probs: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """[rows, k] falling log-probabilities as bytes."""
    exact_k, values = config["exact_k"], log_probs
    if config.get("delta_encoding", True):
        values = np.diff(log_probs, axis=1, prepend=0.0)
    exact_dtype = config.get("exact_dtype", "float32")
    chunks = [as_bytes(values[:, :exact_k], exact_dtype)]
    rest = values[:, exact_k:]
    if terms := config.get("polynomial_terms"):
        at = np.arange(rest.shape[1]) / (rest.shape[1] - 1 if config.get("normalize_t") else 1)
        basis = np.stack([np.sqrt(at) if t == "sqrt" else at**t for t in terms], axis=1)
        coefficients = np.linalg.lstsq(basis, rest.T, rcond=None)[0].T
        chunks.append(as_bytes(coefficients, config.get("term_dtype", "float32")))
        rest = rest - coefficients @ basis.T
    start = 0
    for part in config["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        chosen = rest[:, start : start + count]
        scale = np.abs(chosen).max(axis=1, keepdims=True) / 2 ** (bits - 1)
        codes = np.rint(chosen / scale).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        chunks += [as_bytes(scale, part["scale_dtype"]), pack(codes + 2 ** (bits - 1), bits)]
        start += count
    return np.concatenate(chunks, axis=1)


def capture(texts: list[Said], config: dict[str, Any]) -> list[dict[str, Any]]:
    bits = (config["d"] - 1).bit_length()
    rows = []
    for said in texts:
        top = [said.top(config["k"], row) for row in range(len(said.log_probs))]
        ids = np.array([[i for i, _ in row] for row in top])
        values = np.array([[p for _, p in row] for row in top])
        rows.append(
            {
                "input_ids": said.tokens.tolist(),
                "compressed_logprobs": compress(values, config).tolist(),
                "bytepacked_indices": pack(ids, bits).tolist(),
            }
        )
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    nested = pa.list_(pa.list_(pa.uint8()))
    kinds = {"compressed_logprobs": nested, "bytepacked_indices": nested}
    arrays = {
        name: pa.array([row[name] for row in rows], kinds.get(name, pa.list_(pa.uint64())))
        for name in rows[0]
    }
    parquet.write_table(pa.table(arrays), file)
    return str(file)


TEXTS = [say(number) for number in range(5)]
CURVED = {**EXACT, "exact_k": 4, "polynomial_terms": [0, 1, 2, "sqrt"]}
BINS = [
    {"scale_dtype": "float32", "element_bits": 9, "num_elements": 5},
    {"scale_dtype": "float16", "element_bits": 6, "num_elements": 3},
]


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (EXACT, 1e-5),
        ({**EXACT, "delta_encoding": True}, 1e-5),
        ({**EXACT, "exact_dtype": "bfloat16"}, 0.04),
        ({**CURVED, "residual_bins": BINS}, 0.05),
        ({**CURVED, "residual_bins": BINS, "delta_encoding": True, "normalize_t": True}, 0.1),
        ({**EXACT, "exact_k": 4, "residual_bins": BINS}, 0.3),
        ({**EXACT, "exact_k": 4, "residual_bins": BINS, "delta_encoding": True}, 0.1),
    ],
    ids=["exact", "deltas", "bfloat16", "curve", "curve of deltas", "codes", "codes of deltas"],
)
def test_a_capture_says_what_the_teacher_said(
    tmp_path: Path, config: dict[str, Any], tolerance: float
) -> None:
    file = write(tmp_path / "data_0.parquet", capture(TEXTS, config))
    cache = import_files(tmp_path, {"name": "distillkit", "compression": config}, file)
    assert cache.manifest.targets.top_k == K
    for row, said in enumerate(TEXTS):
        assert_says(cache, row, said, K, tolerance)


def test_the_config_beside_the_capture_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "data_0.parquet", capture(TEXTS, EXACT))
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(EXACT), encoding="utf-8")
    cache = import_files(tmp_path, "distillkit", file)
    assert_says(cache, 0, TEXTS[0], K, 1e-5)
    imported = cache.manifest.imported
    assert imported is not None
    assert imported.format["compression"]["k"] == K
    assert (imported.temperature, imported.rows["entries"]) == (1.0, [K, K])


def test_a_capture_without_its_config_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "data_0.parquet", capture(TEXTS, EXACT))
    with pytest.raises(ConfigError, match=r"format\.compression is missing"):
        import_files(tmp_path, "distillkit", file)


@given(
    d=st.sampled_from([2, 255, 256, 131_071, 131_072, 131_073, 151_670, 262_144, 2**20]),
    data=st.data(),
)
def test_ids_of_any_width_are_those_that_were_packed(d: int, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, d - 1), min_size=1, max_size=9))
    compression = Compression(d=d, k=len(ids), exact_k=len(ids))
    packed = pack(np.array([ids, ids[::-1]]), (d - 1).bit_length())
    assert compression.unpack_ids(packed).tolist() == [ids, ids[::-1]]


def test_packed_documents_stay_apart(tmp_path: Path) -> None:
    """Packing drops each text's last token, so nothing is known of what its last row is about."""
    first, second = capture(TEXTS[:2], EXACT)
    counts = [len(said.log_probs) for said in TEXTS[:2]]
    packed = {name: [*first[name][: counts[0]], *second[name][: counts[1]]] for name in first}
    packed["attention_mask"] = [1] * counts[0] + [2] * counts[1]
    file = write(tmp_path / "packed.parquet", [packed])
    cache = import_files(tmp_path, {"name": "distillkit", "compression": EXACT}, file)
    example = cache[0]
    assert example.segment_lengths.tolist() == counts
    assert len(example.targets) == sum(counts)
    unlabelled = np.flatnonzero(example.label_ids == UNLABELLED).tolist()
    assert unlabelled == [counts[0] - 1, sum(counts) - 1]


def test_plain_rows_need_no_config(tmp_path: Path) -> None:
    rows = []
    for said in TEXTS:
        top = [said.top(K, row) for row in range(len(said.log_probs))]
        rows.append(
            {
                "input_ids": said.tokens.tolist(),
                "token_ids": [[i for i, _ in row] for row in top],
                "top_values": [[p for _, p in row] for row in top],
            }
        )
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "plain.parquet")
    cache = import_files(tmp_path, "distillkit", str(tmp_path / "plain.parquet"))
    assert_says(cache, 3, TEXTS[3], K, 1e-5)


@pytest.mark.parametrize("changes", [{"k": K + 1, "exact_k": K + 1}, {"exact_dtype": "bfloat16"}])
def test_another_config_than_that_of_the_capture_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    file = write(tmp_path / "data_0.parquet", capture(TEXTS, EXACT))
    with pytest.raises(DataError, match=r"data_0\.parquet: row 0: .*config of the capture"):
        wrong = {"name": "distillkit", "compression": {**EXACT, **changes}}
        import_files(tmp_path, wrong, file)


def test_ids_that_may_have_wrapped_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "data_0.parquet", capture(TEXTS, EXACT))
    other = save_tokenizer(tmp_path / "other", 513)
    with pytest.raises(MismatchError, match="513 ids, the dump's compression keeps ids below 512"):
        import_files(tmp_path, {"name": "distillkit", "compression": EXACT}, file, tokenizer=other)


def test_a_tokenizer_with_fewer_ids_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "data_0.parquet", capture(TEXTS, EXACT))
    other = save_tokenizer(tmp_path / "other", 200)
    with pytest.raises(DataError, match="the tokenizer has 200; give the tokenizer"):
        import_files(tmp_path, {"name": "distillkit", "compression": EXACT}, file, tokenizer=other)


def test_the_older_compression_is_refused_with_its_reason(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2], "packed_indices": [[1]], "exact_values": [[0.5]], "coeffs": [[0.1]]}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "old.parquet")
    with pytest.raises(DataError, match="centred logits"):
        import_files(tmp_path, "distillkit", str(tmp_path / "old.parquet"))
