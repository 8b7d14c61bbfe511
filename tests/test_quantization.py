"""Vectors come back from few bits within the error that each dtype promises."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cache_examples import make_draft, make_example, make_examples, write_cache
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pipeline.cache import Signal, TeacherCache, VectorType
from pipeline.cache.signals.quantization import ENCODINGS, SCALE, Block

LARGEST = float(np.finfo(np.float32).max)
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
SCALED: tuple[VectorType, ...] = ("float8_e4m3fn", "int8")
# Zeros, subnormal numbers and the largest ones of float32 among them.
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FINITE)


def bring_back(values: torch.Tensor, dtype: VectorType) -> torch.Tensor:
    encoding = ENCODINGS[dtype]
    out = torch.full(values.shape, torch.nan)
    Block(encoding, encoding.encode(values)).decode(slice(0, len(values)), out)
    return out


def scales(values: torch.Tensor, peak: float) -> torch.Tensor:
    return (values.abs().amax(dim=1, keepdim=True) / peak).clamp(min=SMALLEST_NORMAL)


ERRORS: dict[VectorType, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": torch.zeros_like,
    "float16": lambda x: (x.abs() * 2**-11).clamp(min=2**-25),
    "bfloat16": lambda x: (x.abs() * 2**-8).clamp(min=2**-134),
    "float8_e4m3fn": lambda x: torch.maximum(x.abs() / 16, scales(x, 448.0) * 2**-10) * 1.001,
    "int8": lambda x: scales(x, 127.0).expand_as(x) * 0.5001,
}


@pytest.mark.parametrize("dtype", ENCODINGS)
@given(values=ROWS)
def test_no_number_is_off_by_more_than_promised(dtype: VectorType, values: np.ndarray) -> None:
    limit = ENCODINGS[dtype].limit
    given_values = torch.from_numpy(values.clip(-limit, limit))
    found = bring_back(given_values, dtype)
    error = (found.double() - given_values.double()).abs()
    assert bool((error <= ERRORS[dtype](given_values).double()).all())


@pytest.mark.parametrize("dtype", SCALED)
@given(values=ROWS)
def test_no_number_outgrows_the_largest_of_its_row(dtype: VectorType, values: np.ndarray) -> None:
    given_values = torch.from_numpy(values)
    found = bring_back(given_values, dtype)
    largest = given_values.abs().amax(dim=1)
    assert bool((found.abs().amax(dim=1) <= largest.clamp(min=SMALLEST_NORMAL)).all())
    assert bool((found * given_values >= 0).all())  # no sign turns


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("size", [LARGEST, 1e30, 1.0, 1e-30, 1e-45])
def test_rows_of_any_size_have_a_finite_scale_of_their_own(dtype: VectorType, size: float) -> None:
    row = torch.tensor([[size, -size, size / 2, 0.0]])
    both = torch.cat([torch.ones(1, 4), row])
    scale = ENCODINGS[dtype].encode(both)[1]
    assert np.isfinite(scale).all() and (scale >= SMALLEST_NORMAL).all()
    assert torch.equal(bring_back(both, dtype)[:1], bring_back(torch.ones(1, 4), dtype))
    if size > 1e-40:
        torch.testing.assert_close(bring_back(row, dtype), row, rtol=0.07, atol=0)


def test_the_codes_of_float8_mean_what_torch_means_by_them() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN, which is never written
    expected = codes.view(torch.float8_e4m3fn).float()[None]
    out = torch.empty_like(expected)
    ENCODINGS["float8_e4m3fn"].decode([codes[None].numpy(), np.ones((1, 1), np.float32)], out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", ENCODINGS)
def test_rows_span_chunks_and_files(dtype: VectorType, tmp_path: Path) -> None:
    signals = {
        "layer.0": Signal(width=2048, dtype=dtype),
        "pooled": Signal(width=3, dtype=dtype, per="example"),
    }
    draft = make_draft(3, signals=signals, shard_examples=3)
    examples = [make_example(row, draft, tokens) for row, tokens in enumerate((700, 4_200, 40))]
    if dtype == "int8":  # more than one file
        examples[1] = make_example(1, draft, 17_000)
    write_cache(tmp_path, draft, examples)
    cache = TeacherCache.open(tmp_path)
    for row in (2, 0, 1):
        for name, values in examples[row].hidden.items():
            assert torch.equal(cache[row].hidden[name], bring_back(values, dtype))
    group = zarr.open_group(tmp_path / "shards/00000/hidden.zarr", mode="r")
    rows = torch.cat([example.hidden["layer.0"] for example in examples])
    for end, part in zip(ENCODINGS[dtype].arrays, ENCODINGS[dtype].encode(rows), strict=True):
        np.testing.assert_array_equal(group["layer.0" + end][:], part)


def test_the_page_of_the_format_says_how_bits_become_numbers(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "data" / "README.md"
    code = page.read_text(encoding="utf-8").split("## hidden.zarr")[1].split("```python\n")[1]
    kept = {"half": "bfloat16", "eighth": "float8_e4m3fn", "even": "int8"}
    draft = make_draft(1, signals={name: Signal(width=6, dtype=name) for name in kept.values()})
    write_cache(tmp_path, draft)
    group = zarr.open_group(tmp_path / "shards/00000/hidden.zarr", mode="r")
    lines = code.split("```")[0].splitlines()
    for found, name in kept.items():
        scope = {"group": group, "name": name, "torch": torch, "np": np}
        exec("\n".join(line for line in lines if line.startswith(found)), scope)
        expected = TeacherCache.open(tmp_path)[0].hidden[name].numpy()
        np.testing.assert_allclose(torch.as_tensor(scope[found]).float(), expected, rtol=1e-6)


def test_any_zarr_reader_gets_the_numbers(tmp_path: Path) -> None:
    signals = {name: Signal(width=6, dtype=name) for name in ENCODINGS}
    draft = make_draft(4, signals=signals)
    write_cache(tmp_path, draft)
    group = zarr.open_group(tmp_path / "shards/00000/hidden.zarr", mode="r")
    assert set(group) == {*ENCODINGS, *(name + SCALE for name in SCALED)}
    read = {
        "float32": group["float32"][:],
        "float16": group["float16"][:],
        "bfloat16": (group["bfloat16"][:].astype(np.uint32) << 16).view(np.float32),
        "float8_e4m3fn": torch.from_numpy(group["float8_e4m3fn"][:])
        .view(torch.float8_e4m3fn)
        .float()
        .numpy()
        * group["float8_e4m3fn.scale"][:],
        "int8": group["int8"][:] * group["int8.scale"][:],
    }
    cache = TeacherCache.open(tmp_path)
    for name, values in read.items():
        expected = torch.cat([cache[row].hidden[name] for row in range(4)]).numpy()
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        given_values = torch.cat([example.hidden[name] for example in make_examples(draft)])
        np.testing.assert_allclose(values, given_values.numpy(), rtol=0.07, atol=0.02)


def test_zeros_take_no_file(tmp_path: Path) -> None:
    draft = make_draft(1, signals={"layer.0": Signal(width=4, dtype="float32")})
    example = make_example(0, draft, 5)
    example.hidden["layer.0"].zero_()  # type: ignore[index]
    write_cache(tmp_path, draft, [example])
    assert not list(tmp_path.glob("shards/00000/hidden.zarr/layer.0/c/*/0"))
    assert torch.equal(TeacherCache.open(tmp_path)[0].hidden["layer.0"], torch.zeros(5, 4))
    array = zarr.open_group(tmp_path / "shards/00000/hidden.zarr", mode="r")["layer.0"]
    np.testing.assert_array_equal(array[:], np.zeros((5, 4)))
