"""Projections: what they keep, that every session uses the same one, what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_examples import make_draft, make_examples, write_cache, write_shards
from hypothesis import given
from hypothesis import strategies as st
from small_runs import make_language_cache, make_student_config, make_topic_cache, read_lines
from small_teachers import make_config, make_llama, make_rows, read_files, save_teacher, write_rows

from pipeline.cache import CacheWriter, Draft, Signal, TeacherCache, read_bases
from pipeline.cache.signals.projection import FILE, Basis, Pca, Projection, Random
from pipeline.config import load_config
from pipeline.errors import CacheError, ConfigError, DataError, MismatchError, NumericalError
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.shipped import CONFIGS
from stages.train_student import train_student

PCA, RANDOM = {"name": "pca", "width": 2}, {"name": "random", "width": 3}


def project(width: int, projection: dict[str, Any], **changes: Any) -> Signal:
    kept = {"width": projection["width"], "projection": projection, "source_width": width}
    return Signal.model_validate(kept | changes)


DRAFT = make_draft(
    10,
    signals={
        "layer.0": project(6, PCA, dtype="int8"),
        "layer.1": project(5, RANDOM),
        "pooled": project(3, PCA, per="example", dtype="float32"),
    },
)


def fit(projection: Projection, vectors: np.ndarray, name: str = "layer.0") -> Basis:
    blocks = torch.from_numpy(vectors.astype(np.float32)).split(7)  # type: ignore[no-untyped-call]
    return projection.fit(name, vectors.shape[1], lambda: blocks)


def make_vectors(rows: int = 50, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asarray(rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 3.0)


def test_a_pca_keeps_the_directions_of_the_highest_variance() -> None:
    vectors = make_vectors()
    centred = vectors - vectors.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    basis = fit(Pca(width=4), vectors)
    np.testing.assert_allclose(basis.mean, vectors.mean(axis=0), rtol=1e-5)
    products = basis.components.numpy() @ directions[:4].T
    np.testing.assert_allclose(np.abs(products), np.eye(4), atol=1e-4)
    share = sizes**2 / (sizes**2).sum()
    np.testing.assert_allclose(basis.explained_variance, share[:4], rtol=1e-4)
    back = basis.reconstruct(basis.project(torch.from_numpy(vectors))).numpy()
    lost = ((vectors - back) ** 2).sum() / (centred**2).sum()
    assert lost == pytest.approx(share[4:].sum(), rel=1e-4)


@pytest.mark.parametrize("member", [Pca, Random])
@given(width=st.integers(1, 6), seed=st.integers(0, 99))
def test_components_are_orthonormal_and_all_of_them_lose_nothing(
    member: type[Projection], width: int, seed: int
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(20, 6))
    basis = fit(member(name=member.model_fields["name"].default, width=width), vectors)
    products = basis.components @ basis.components.T
    torch.testing.assert_close(products, torch.eye(width), rtol=0, atol=1e-5)
    back = basis.reconstruct(basis.project(torch.from_numpy(vectors)))
    again = basis.reconstruct(basis.project(back))
    torch.testing.assert_close(again, back, rtol=0, atol=1e-4)
    if width == 6:
        np.testing.assert_allclose(back, vectors, atol=1e-4)


def test_a_random_projection_is_a_function_of_seed_and_signal() -> None:
    vectors = make_vectors()
    one = fit(Random(width=3), vectors)
    assert torch.equal(one.components, fit(Random(width=3), vectors + 1).components)
    assert not torch.equal(one.components, fit(Random(width=3, seed=1), vectors).components)
    assert not torch.equal(one.components, fit(Random(width=3), vectors, "layer.1").components)
    assert one.mean.tolist() == [0.0] * 6 and len(one.explained_variance) == 0


def test_what_is_kept_is_the_projection_by_the_kept_matrix(tmp_path: Path) -> None:
    manifest = write_cache(tmp_path, DRAFT)
    cache = TeacherCache.open(tmp_path)
    bases = read_bases(tmp_path, str(manifest.projections))
    assert set(bases) == set(DRAFT.signals)
    for row, example in enumerate(make_examples(DRAFT)):
        for name, vectors in example.hidden.items():
            found, expected = cache[row].hidden[name], bases[name].project(vectors)
            limit = {"int8": 0.01, "float16": 1e-2, "float32": 1e-6}[DRAFT.signals[name].dtype]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=limit * 5)
    first = torch.cat([example.hidden["layer.0"] for example in make_examples(DRAFT)[:4]])
    torch.testing.assert_close(bases["layer.0"].mean, first.mean(dim=0))


def test_no_basis_is_fitted_and_no_fidelity_measured_on_what_was_not_answered(
    tmp_path: Path,
) -> None:
    signals = {"pooled": project(3, PCA, per="example", dtype="float16")}
    whole = make_draft(9, signals=signals, shard_examples=9)
    examples, made = make_examples(whole), []
    for name, gap in (("gap", 4), ("without", None)):
        draft = whole if gap else make_draft(8, signals=signals, shard_examples=8)
        writer = CacheWriter(tmp_path / name, draft)
        with writer.shard(0) as shard:
            for row, example in enumerate(examples):
                if row != 4:
                    shard.add(example)
                elif gap:
                    shard.skip(example, "NaN")
        made.append(writer.finish())
    assert made[0].projections == made[1].projections and made[0].fidelity == made[1].fidelity
    basis = read_bases(tmp_path / "gap", str(made[0].projections))["pooled"]
    found = TeacherCache.open(tmp_path / "gap")[4].hidden["pooled"]
    torch.testing.assert_close(found, basis.project(torch.zeros(1, 3)), rtol=1e-3, atol=1e-3)


def begin(path: Path, draft: Draft, shards: list[int]) -> CacheWriter:
    writer = CacheWriter(path, draft)
    write_shards(writer, make_examples(draft), shards)
    return writer


def test_a_later_session_projects_as_the_first_one_did(tmp_path: Path) -> None:
    write_cache(tmp_path / "whole", DRAFT)
    begin(tmp_path / "cut", DRAFT, [0])
    matrix = (tmp_path / "cut" / FILE).read_bytes()
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path / "cut", DRAFT).shard(1) as shard:
        shard.add(make_examples(DRAFT)[4])
        raise KeyboardInterrupt
    assert CacheWriter(tmp_path / "cut", DRAFT).finished == {0}
    write_cache(tmp_path / "cut", DRAFT)
    assert (tmp_path / "cut" / FILE).read_bytes() == matrix
    assert all_files(tmp_path / "cut") == all_files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["lost", "cut short", "another file"])
def test_shards_whose_matrix_is_lost_are_written_again(tmp_path: Path, damage: str) -> None:
    write_cache(tmp_path / "whole", DRAFT)
    begin(tmp_path / "cut", DRAFT, [0, 1])
    file = tmp_path / "cut" / FILE
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5] if damage == "cut short" else b"{}")
    assert CacheWriter(tmp_path / "cut", DRAFT).finished == set()
    write_cache(tmp_path / "cut", DRAFT)
    assert all_files(tmp_path / "cut") == all_files(tmp_path / "whole")


def test_a_first_shard_that_is_written_again_keeps_its_matrix(tmp_path: Path) -> None:
    write_cache(tmp_path / "whole", DRAFT)
    begin(tmp_path / "cut", DRAFT, [0])
    (tmp_path / "cut/shards/00000/rows.arrow").write_bytes(b"")
    writer = CacheWriter(tmp_path / "cut", DRAFT)
    assert writer.finished == set()
    write_shards(writer, make_examples(DRAFT), [1, 0, 2])
    writer.finish()
    assert all_files(tmp_path / "cut") == all_files(tmp_path / "whole")


def test_the_first_shard_comes_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard 0 comes first"):
        begin(tmp_path, DRAFT, [1])


def test_a_matrix_of_another_cache_is_refused(tmp_path: Path) -> None:
    manifest = write_cache(tmp_path, DRAFT)
    (tmp_path / FILE).write_bytes(b"?")
    with pytest.raises(CacheError, match=r"projections.safetensors: is not the one of the mani"):
        read_bases(tmp_path, str(manifest.projections))


def test_too_few_vectors_for_a_pca_are_refused(tmp_path: Path) -> None:
    draft = make_draft(2, signals={"pooled": project(3, PCA, per="example")})
    with pytest.raises(DataError, match=r"pooled: 2 vectors in the first .* 2 principal") as caught:
        write_cache(tmp_path, draft)
    assert "\n" not in str(caught.value)


def test_projected_numbers_that_outgrow_the_dtype_are_refused(tmp_path: Path) -> None:
    draft = make_draft(1, signals={"layer.0": project(6, RANDOM)})
    [example] = make_examples(draft)
    example.hidden["layer.0"].fill_(1e6)
    with pytest.raises(NumericalError, match=r"hidden layer.0 holds numbers above the 65504"):
        write_cache(tmp_path, draft, [example])
    roomy = make_draft(1, signals={"layer.0": project(6, RANDOM, dtype="int8")})
    write_cache(tmp_path / "roomy", roomy, [example])


def all_files(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), make_llama())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(20))


def test_a_student_learns_from_projected_int8_vectors(tmp_path: Path) -> None:
    hidden = {"layers": [0, -1], "dtype": "int8", "projection": {"name": "pca", "width": 8}}
    path = make_language_cache(tmp_path, hidden=hidden)
    cache = TeacherCache.open(path)
    assert cache[0].hidden["layer.2"].shape == (len(cache[0].targets), 8)
    assert 0.5 < cache.manifest.fidelity["layer.2"].cosine < 1
    losses = [{"name": "forward_kl"}, {"name": "hidden_mse", "layers": {0: 0, 1: -1}}]
    once = {"max_steps": 1, "logging_steps": 1}
    run = train_student(make_student_config(path, tmp_path / "run", losses=losses, training=once))
    assert read_lines(run)[0]["term/hidden_mse"] > 0


def test_pooled_vectors_are_projected_too(tmp_path: Path) -> None:
    hidden = {"pooled": True, "dtype": "bfloat16", "projection": {"name": "random", "width": 5}}
    path = make_topic_cache(tmp_path, hidden=hidden)
    assert TeacherCache.open(path)[0].hidden["pooled"].shape == (1, 5)


def test_the_same_config_gives_the_same_bytes(tmp_path: Path, teacher: Path, data: Path) -> None:
    projection = {"name": "pca", "width": 12}
    hidden = {"layers": [-1], "pooled": True, "dtype": "float8_e4m3fn", "projection": projection}
    sides = [
        make_config(tmp_path / name, teacher, data, hidden=hidden, shard={"examples": 13})
        for name in ("one", "two")
    ]
    files = [read_files(cache_teacher(side, progress=False)) for side in sides]
    assert files[0] == files[1]
    matrices = [(side.output / FILE).read_bytes() for side in sides]
    assert matrices[0] == matrices[1]


@pytest.mark.parametrize(
    ("hidden", "error", "complaint"),
    [
        (
            {"layers": [-1], "projection": {"name": "pca", "width": 33}},
            ConfigError,
            r"hidden.projection.width: 33 is more than the 32 numbers of the teacher's",
        ),
        (
            {"pooled": True, "projection": {"name": "pca", "width": 6}},
            DataError,
            r"hidden pooled: 6 vectors in the first shard are too few for 6 principal components",
        ),
    ],
)
def test_a_projection_that_cannot_be_is_refused_before_the_teacher_is_asked(
    tmp_path: Path,
    teacher: Path,
    data: Path,
    hidden: dict[str, Any],
    error: type[Exception],
    complaint: str,
) -> None:
    with pytest.raises(error, match=complaint) as caught:
        cache_teacher(make_config(tmp_path, teacher, data, hidden=hidden), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "draft.json").exists()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("projection={name: pcs, width: 3}", "projection 'pcs' is not known; did you mean 'pca'"),
        ("projection=pca", "projection 'pca': width is missing; add it"),
        ("projection={name: pca, width: 0}", "width: .*greater than 0"),
        ("projection={name: pca, width: 4, seed: 1}", "unknown key 'seed'"),
        ("dtype=float8", "hidden.dtype: .*'float8_e4m3fn'.*found 'float8'"),
    ],
)
def test_unknown_settings_are_refused_in_one_line(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(CacheConfig, CONFIGS / "cache" / "demo.yaml", [f"hidden.{override}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hidden", "field"),
    [
        ({"dtype": "int8"}, r"hidden\.dtype float16, asked for int8"),
        (
            {"projection": {"name": "random", "width": 4}},
            r"hidden\.projection null, asked for .*random",
        ),
        ({"positions": "last"}, r"hidden\.positions all, asked for last"),
    ],
)
def test_other_hidden_states_do_not_fit_a_finished_cache(
    tmp_path: Path, teacher: Path, data: Path, hidden: dict[str, Any], field: str
) -> None:
    kept = {"layers": [-1], "projection": "none"}
    cache_teacher(make_config(tmp_path, teacher, data, hidden=kept), progress=False)
    with pytest.raises(MismatchError, match=f"cached with {field}"):
        cache_teacher(make_config(tmp_path, teacher, data, hidden=kept | hidden), progress=False)
