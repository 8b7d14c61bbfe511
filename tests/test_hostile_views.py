"""A view that a stranger made names what it likes: one line, no loop, no file touched before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_examples import make_draft, write_cache
from typer.testing import CliRunner

from pipeline.cache import RowRuns, TeacherCache, list_parts, select_rows, write_view
from pipeline.cache.documents import write_sealed
from pipeline.cache.views.file import write_runs
from pipeline.errors import CacheError, MismatchError
from stages.cli import app


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("caches") / "cache"
    write_cache(path, make_draft(10))
    return TeacherCache.open(path)


def make_view(folder: Path, cache: TeacherCache, *parts: dict[str, Any], **more: Any) -> Path:
    """A view.json as anybody may write it; parts are of the cache unless they say otherwise."""
    whole = {"path": str(cache.path), "digest": cache.manifest.digest}
    folder.mkdir(exist_ok=True)
    write_sealed(folder / "view.json", {"version": 1, "parts": [whole | p for p in parts], **more})
    return folder


def require_refused(path: Path, match: str, kind: type[CacheError] = CacheError) -> None:
    with pytest.raises(kind, match=match) as caught:
        TeacherCache.open(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_view_is_no_part_of_a_view_so_none_leads_to_itself(
    cache: TeacherCache, tmp_path: Path
) -> None:
    for name in (".", "../one", "../two"):
        make_view(tmp_path / "two", cache, {"path": "../one"})
        require_refused(
            make_view(tmp_path / "one", cache, {"path": name}), "is no cache|no manifest"
        )


@pytest.mark.parametrize("name", ["http://localhost/x", "s3+http://x", "a\x00b", "simplecache::x"])
def test_an_address_of_no_known_kind_is_refused(
    cache: TeacherCache, tmp_path: Path, name: str
) -> None:
    require_refused(
        make_view(tmp_path / "view", cache, {"path": name}), "is no folder and no store"
    )


def test_a_folder_that_is_not_the_cache_meant_is_not_looked_through(
    cache: TeacherCache, tmp_path: Path
) -> None:
    """A link in a loop below it would tell whoever walked there."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "loop").symlink_to(home / "loop")
    view = make_view(tmp_path / "view", cache, {"path": "../home"})
    require_refused(view, "home: ")
    write_cache(home, make_draft(4))
    require_refused(view, "is a view of another cache than stands in", MismatchError)
    digest = TeacherCache.open(cache.path).manifest.digest
    assert digest == cache.manifest.digest


def test_a_view_is_not_repaired_as_it_may_name_anybodys_folder(
    cache: TeacherCache, tmp_path: Path
) -> None:
    view = make_view(tmp_path / "view", cache, {})
    before = sorted(cache.path.iterdir())
    found = CliRunner().invoke(app, ["verify", str(view), "--repair"])
    assert "--repair changes no cache that it names" in str(found.exception)
    assert sorted(cache.path.iterdir()) == before


@pytest.mark.parametrize(
    ("starts", "counts"),
    [([0], [10**12]), ([2**62], [2**62]), ([-5], [3]), ([4, 0], [1, 1]), ([0, 1], [2, 2])],
)
def test_rows_that_a_cache_does_not_have_are_refused(
    cache: TeacherCache, tmp_path: Path, starts: list[int], counts: list[int]
) -> None:
    runs = RowRuns(np.array(starts, dtype=np.int64), np.array(counts, dtype=np.int64))
    digest = write_runs(tmp_path / "view", runs)
    view = make_view(tmp_path / "view", cache, {"rows": digest})
    require_refused(view, "its runs are not ascending rows below 10")


def test_a_row_is_taken_once(cache: TeacherCache, tmp_path: Path) -> None:
    view = tmp_path / "view"
    rows = [write_runs(view, RowRuns.of(np.array(numbers))) for numbers in ([0, 1, 5], [4, 5, 9])]
    make_view(view, cache, {"rows": rows[0]}, {"rows": rows[1]})
    require_refused(view, "takes a row of one cache twice")
    make_view(view, cache, {}, {"path": f"{cache.path}/../cache"})
    require_refused(view, "takes a row of one cache twice")
    apart = [*select_rows(cache, RowRuns.of(np.array([4, 9])))]
    apart += select_rows(cache, RowRuns.of(np.array([0, 5])))
    assert list(write_view(tmp_path / "apart", apart).ids()) == [f"text-{n}" for n in (4, 9, 0, 5)]


def test_more_parts_than_a_view_may_have_are_refused_unopened(
    cache: TeacherCache, tmp_path: Path
) -> None:
    count, nobody = 20_001, {"path": "../nowhere", "digest": "0" * 64}
    require_refused(make_view(tmp_path / "view", cache, *[nobody] * count), "20,000 at most")
    view = make_view(tmp_path / "over", cache, {"overlays": [nobody] * count})
    require_refused(view, "parts and overlays, a view has 20,000 at most")


def test_so_many_are_not_written_either(cache: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="20,000 at most; cache again what belongs together"):
        write_view(tmp_path / "view", [*list_parts(cache)] * 20_001)


def test_an_overlay_of_other_length_is_refused(cache: TeacherCache, tmp_path: Path) -> None:
    rows = write_runs(tmp_path / "view", RowRuns.of(np.array([1])))
    over = {"path": str(cache.path), "digest": cache.manifest.digest, "rows": rows}
    view = make_view(tmp_path / "view", cache, {"overlays": [over]})
    require_refused(view, "lays 1 rows of .* over 10 of")
    assert json.loads((view / "view.json").read_text())["parts"][0]["overlays"] == [over]
