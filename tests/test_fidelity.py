"""The fidelity report against direct computations, and where it is found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_examples import make_draft, make_example, make_examples, write_cache
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.cache import Signal, TeacherCache, read_bases
from pipeline.cache.signals.fidelity import Sample, linear_cka, measure
from pipeline.cache.signals.projection import Basis
from stages.inspect import inspect


def centred_kernel(x: np.ndarray) -> np.ndarray:
    middle = np.eye(len(x)) - 1 / len(x)
    return np.asarray(middle @ x @ x.T @ middle)


@pytest.mark.parametrize("shape", [(40, 5), (6, 30)])
@pytest.mark.parametrize("width", [3, 5])
def test_cka_is_the_alignment_of_centred_kernels(shape: tuple[int, int], width: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) + 4.0
    y = x @ rng.normal(size=(shape[1], width)) + rng.normal(size=(shape[0], width))
    own, other = centred_kernel(x), centred_kernel(y)
    expected = np.trace(own @ other) / np.sqrt(np.trace(own @ own) * np.trace(other @ other))
    found = linear_cka(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 100), st.floats(0.01, 100))
def test_cka_sees_neither_scale_nor_rotation(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(x, scale * x @ turned + 3.0) == pytest.approx(1.0, abs=1e-6)


def test_vectors_that_do_not_vary_have_no_cka() -> None:
    same = torch.ones(5, 3)
    found = measure(same, same, None)
    assert (found.cka, found.cosine, found.relative_mse) == (None, 1.0, 0.0)
    assert measure(torch.zeros(2, 3), torch.zeros(2, 3), None).cosine == 1.0


def test_cosine_and_error_are_those_of_the_reconstruction() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 6)), rng.normal(size=(200, 2))
    components, mean = np.linalg.qr(rng.normal(size=(6, 2)))[0].T, rng.normal(size=6)
    x, y, components, mean = (a.astype(np.float32) for a in (x, y, components, mean))
    basis = Basis(*(torch.from_numpy(a) for a in (components, mean)), torch.tensor([0.5, 0.25]))
    found = measure(torch.from_numpy(x), torch.from_numpy(y), basis)
    back = y @ components + mean
    cosines = (x * back).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(back, axis=1)
    assert found.cosine == pytest.approx(cosines.mean(), rel=1e-5)
    assert found.cosine_p1 == pytest.approx(np.quantile(cosines, 0.01), rel=1e-5)
    assert found.relative_mse == pytest.approx(((x - back) ** 2).sum() / (x**2).sum(), rel=1e-5)
    assert found.cka == linear_cka(torch.from_numpy(x).double(), torch.from_numpy(y).double())
    assert (found.rows, found.explained_variance) == (200, 0.75)


@given(st.lists(st.integers(0, 700), max_size=30), st.integers(1, 3))
def test_a_sample_is_evenly_spaced_and_bounded(counts: list[int], exponent: int) -> None:
    width = 2**22 // 10**exponent  # at most 10, 100, 1,000 rows
    sample, start = Sample(width), 0
    for count in counts:
        rows = torch.arange(start, start + count)[sample.pick(count)][:, None]
        sample.add(rows, -rows)
        start += count
    found = sample._join()[0][:, 0] if counts else torch.zeros(0)
    assert len(found) <= 10**exponent
    step = 1 if len(found) < 2 else int(found[1])
    assert found.tolist() == list(range(0, start, step))
    assert start <= 10**exponent or len(found) > 10**exponent // 2 - 1


def test_a_sample_keeps_no_rows_but_its_own() -> None:
    sample = Sample(2**22 // 100)
    for _ in range(200):
        block = torch.zeros(512, 3)
        picked = sample.pick(512)
        sample.add(block[picked], block[picked])
    held = sum(t.untyped_storage().nbytes() for pair in sample._pairs for t in pair)
    assert held <= 2 * 100 * 3 * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("projection", [None, {"name": "pca", "width": 5}])
def test_the_manifest_tells_of_the_first_shard(
    tmp_path: Path, dtype: str, projection: dict[str, object] | None
) -> None:
    kept = {"width": 9}
    if projection is not None:
        kept = {"width": 5, "projection": projection, "source_width": 9}  # type: ignore[dict-item]
    draft = make_draft(
        6, signals={"layer.0": Signal.model_validate(kept | {"dtype": dtype})}, shard_examples=4
    )
    examples = [make_example(row, draft, tokens=200) for row in range(6)]
    manifest = write_cache(tmp_path, draft, examples)
    cache = TeacherCache.open(tmp_path)
    assert cache.manifest.fidelity == manifest.fidelity
    basis = None if projection is None else read_bases(tmp_path, str(manifest.projections))
    x = torch.cat([example.hidden["layer.0"] for example in examples[:4]])
    y = torch.cat([cache[row].hidden["layer.0"] for row in range(4)])
    found = manifest.fidelity["layer.0"]
    assert found == measure(x, y, basis and basis["layer.0"])
    assert found.rows == 800
    if projection is None:
        assert found.cosine > 0.998 and found.relative_mse < 1e-3


def test_signals_without_a_vector_have_no_report(tmp_path: Path) -> None:
    draft = make_draft(2, signals={"layer.0": Signal(width=3)}, positions={"every": 100})
    assert write_cache(tmp_path, draft, make_examples(draft)).fidelity == {}


def test_inspect_shows_the_report(tmp_path: Path) -> None:
    signals = {
        "layer.0": Signal(width=4, dtype="int8"),
        "pooled": Signal(
            width=2, per="example", projection={"name": "pca", "width": 2}, source_width=5
        ),
    }
    draft = make_draft(8, signals=signals, positions={"every": 2})
    manifest = write_cache(tmp_path, draft)
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        inspect(tmp_path, None, console)
    output = capture.get()
    assert "4 × int8 per feature, one of 2 positions" in output
    assert "2 × float16 per example, pca projection of 5" in output
    table = output.split("hidden states")[1]
    for name, found in json.loads((tmp_path / "manifest.json").read_text())["fidelity"].items():
        [line] = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        cells = line.split()[1:]
        assert cells[0] == str(manifest.fidelity[name].rows)
        expected = [found["cosine_p1"], found["cosine"], found["relative_mse"], found["cka"]]
        assert [float(cell) for cell in cells[1:5]] == pytest.approx(expected, rel=0.06)
        share = found.get("explained_variance")
        assert cells[5] == ("–" if share is None else f"{100 * share:.1f}")
