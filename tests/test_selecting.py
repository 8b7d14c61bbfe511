"""Views made by the commands: what they take, and that every stage reads them as a cache."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_examples import make_draft, make_examples, write_cache
from rich.console import Console
from small_runs import (
    make_data,
    make_language_cache,
    make_student_config,
    make_topic_cache,
    open_student,
)

from pipeline.cache import CacheWriter, Draft, TeacherCache
from pipeline.errors import CacheError, ConfigError, DataError
from pipeline.runs import read_result
from stages.compare import compare
from stages.evaluate import evaluate
from stages.inspect import inspect
from stages.select import Bounds, Choice, filter_cache, parse_range, parse_where, select
from stages.train_student import train_student

Taking = Callable[..., TeacherCache]


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("topics")
    return make_topic_cache(root, data={**make_data(root), "carry": ["text", "language", "label"]})


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = {"top_k": 8, "temperatures": [1.0, 2.0], "codec": "lossless"}
    targets["compression"] = "none"  # which numbers classes alike in every shard
    return make_language_cache(tmp_path_factory.mktemp("language"), targets=targets)


@pytest.fixture
def take(topics: Path, tmp_path: Path) -> Taking:
    """Select from the cache of topics, by what a `Choice` says."""

    def call(**choice: object) -> TeacherCache:
        count = select(topics, tmp_path / "view", Choice(**choice), Console(quiet=True))
        view = TeacherCache.open(tmp_path / "view")
        assert len(view) == count
        return view

    return call


def columns_of(cache: TeacherCache, name: str) -> list[object]:
    return [cache[row].columns[name] for row in range(len(cache))]


def test_examples_are_taken_by_split_column_and_number(take: Taking, topics: Path) -> None:
    cache = TeacherCache.open(topics)
    topics_of = columns_of(cache, "label")
    wanted = ["0", "2"]
    view = take(split="train", where={"label": wanted, "language": ["en"]}, every=2, first=3)
    rows = [r for r in cache.split_indices("train").tolist() if str(topics_of[r]) in wanted][::2][
        :3
    ]
    assert list(view.ids()) == [cache[row].example_id for row in rows]


def test_examples_are_taken_by_a_list_of_ids(take: Taking, topics: Path, tmp_path: Path) -> None:
    ids = [*TeacherCache.open(topics).ids()]
    (tmp_path / "ids.txt").write_text(f"{ids[7]}\n{ids[2]}\n\n{ids[7]}\n")
    assert list(take(ids=tmp_path / "ids.txt").ids()) == [ids[2], ids[7]]
    (tmp_path / "ids.txt").write_text("nobody\n")
    with pytest.raises(DataError, match="has no example 'nobody'"):
        take(ids=tmp_path / "ids.txt")


def test_ids_of_any_letters_are_found_whatever_wrote_their_list(tmp_path: Path) -> None:
    names = ["ünïcödé", "日本語 行", "a,b=c", "  spaced  ", "x\u2028y\x0cz", "../../etc", '<b>&"']
    draft = make_draft(len(names))
    examples = [replace(e, example_id=n) for e, n in zip(make_examples(draft), names, strict=True)]
    write_cache(tmp_path / "cache", draft, examples)
    for number, wanted in enumerate((names, names[3:5], names[-1:])):
        view = tmp_path / f"view {number}"
        (tmp_path / "ids.txt").write_bytes("\r\n".join(wanted).encode("utf-8-sig"))
        select(tmp_path / "cache", view, Choice(ids=tmp_path / "ids.txt"), Console(quiet=True))
        found = TeacherCache.open(view)
        assert list(found.ids()) == wanted
        assert all(found.by_id(name).example_id == name for name in wanted)


def test_commas_stand_between_values_unless_they_are_in_one(tmp_path: Path) -> None:
    draft = make_draft(6, columns={"place": "string"})
    places = ["Oslo", "Washington, DC", "Washington", " DC", "Oslo", "Lima"]
    examples = [
        replace(example, columns={"place": place})
        for example, place in zip(make_examples(draft), places, strict=True)
    ]
    write_cache(tmp_path / "cache", draft, examples)
    for number, (asked, rows) in enumerate(
        [("Washington, DC", [1]), ("Oslo,Lima", [0, 4, 5]), ("Washington,Lima", [2, 5])]
    ):
        where, view = parse_where([f"place={asked}"]), tmp_path / f"view {number}"
        select(tmp_path / "cache", view, Choice(where=where), Console(quiet=True))
        assert list(TeacherCache.open(view).ids()) == [examples[row].example_id for row in rows]


def test_a_wish_that_nothing_meets_is_refused(take: Taking, topics: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no example has language 'tlh'"):
        take(where={"language": ["tlh"]})
    with pytest.raises(CacheError, match="carries no column 'langauge'; did you mean 'language'"):
        take(where={"langauge": ["en"]})
    lengths = [len(example.input_ids) for example in TeacherCache.open(topics)]
    found = f"left of 30; kept mass is 1 to 1, tokens is {min(lengths)} to {max(lengths)}; ask for"
    many = Bounds(tokens=(1e6, 2e6), kept_mass=(0.0, 1.0))
    with pytest.raises(DataError, match=f"no example is {found} less"):
        filter_cache(topics, tmp_path / "none", many, Console(quiet=True))
    with pytest.raises(ConfigError, match="no bounds were given; give one or more of --kept-mass"):
        filter_cache(topics, tmp_path / "none", Bounds(), Console(quiet=True))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["kept_mass", "entropy", "loss", "tokens"])
def test_examples_are_taken_by_what_was_said_of_them(
    language: Path, tmp_path: Path, name: str
) -> None:
    cache = TeacherCache.open(language)

    def measure(row: int) -> float:
        example = cache[row]
        at_one = example.targets.at(1.0)
        probs = at_one.log_probs.double().exp()
        known = -(probs * at_one.log_probs).sum(1)
        return {
            "kept_mass": float(probs.sum(1).mean()),
            "entropy": float((known - (1 - probs.sum(1)) * at_one.log_probs.amin(1)).mean()),
            "loss": float(-example.targets.label_log_probs.double().mean()),
            "tokens": float(len(example.input_ids)),
        }[name]

    values = np.array([measure(row) for row in range(len(cache))])
    order = np.sort(values)
    low, high = order[4:6].mean(), order[-6:-4].mean()  # between two, whatever they are rounded to
    bounds = Bounds(**{name: (float(low), float(high))})
    filter_cache(language, tmp_path / "view", bounds, Console(quiet=True))
    rows = np.flatnonzero((values >= low) & (values <= high)).tolist()
    found = TeacherCache.open(tmp_path / "view")
    assert list(found.ids()) == [cache[row].example_id for row in rows]


@pytest.mark.parametrize("mark", ["result.json", "identity.json", "checkpoints/kept"])
def test_a_view_does_not_begin_where_a_run_stands(take: Taking, tmp_path: Path, mark: str) -> None:
    (tmp_path / "view" / mark).parent.mkdir(parents=True)
    (tmp_path / "view" / mark).touch()
    with pytest.raises(CacheError, match=rf"holds a run \({mark.partition('/')[0]}\); choose"):
        take(first=3)
    assert not (tmp_path / "view" / "view.json").exists()


def test_options_of_the_command_line_are_read() -> None:
    assert parse_where(["language=sw,yo", "topic=a=b", "language=en"]) == {
        "language": ["sw,yo", "en"],
        "topic": ["a=b"],
    }
    assert parse_range("--loss", "0.5:2") == (0.5, 2.0)
    assert parse_range("--loss", ":2") == (-np.inf, 2.0)
    assert parse_range("--loss", None) is None
    for text in ("2", "2:1", "a:b", "nan:1", ":"):
        with pytest.raises(ConfigError, match=f"--loss {text}: expected LOW:HIGH"):
            parse_range("--loss", text)
    with pytest.raises(ConfigError, match="expected column=value"):
        parse_where(["language"])


def copy_rows(view: TeacherCache, path: Path) -> Path:
    """A cache of its own that holds what a view shows."""
    fields = {name: getattr(view.manifest, name) for name in Draft.model_fields}
    writer = CacheWriter(path, Draft(**fields))
    for index in range(writer.draft.num_shards):
        with writer.shard(index) as shard:
            first = index * writer.draft.shard_examples
            for row in range(first, first + writer.draft.shard_size(index)):
                shard.add(view[row])
    shutil.copytree(view.tokenizer_path, path / "tokenizer")
    writer.finish()
    return path


def test_a_student_of_a_view_is_that_of_a_cache_with_the_same_rows(
    language: Path, tmp_path: Path
) -> None:
    choice = Choice(every=3)
    select(language, tmp_path / "view", choice, Console(quiet=True))
    view = TeacherCache.open(tmp_path / "view")
    copied = copy_rows(view, tmp_path / "copied")
    losses = [
        {"name": "forward_kl", "temperature": 2.0},
        {"name": "hidden_mse", "layers": {1: -1}, "weight": 0.1},
    ]
    runs = [
        train_student(make_student_config(cache, tmp_path / "runs" / cache.name, losses=losses))
        for cache in (view.path, copied)
    ]
    ours, theirs = (open_student(run).state_dict() for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one, other = ([m.value for m in read_result(run).metrics] for run in runs)
    assert one == other
    assert [m.value for m in evaluate(runs[0])] == [m.value for m in evaluate(runs[1])]


def test_a_view_is_shown_and_compared_by_its_share(topics: Path, tmp_path: Path) -> None:
    select(topics, tmp_path / "view", Choice(every=2), Console(quiet=True))
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as shown:
        inspect(tmp_path / "view", console=console)
    page = "".join(shown.get().split())
    assert f"sees15of30examplesof{topics}" in page
    assert "15of15examples(all)" in page
    run = train_student(
        make_student_config(
            tmp_path / "view",
            tmp_path / "runs" / "student",
            student={
                "from": "scratch",
                "architecture": "bert",
                "layers": 1,
                "hidden_size": 16,
                "heads": 2,
            },
        )
    )
    page = compare([run], tmp_path / "report.html", Console(quiet=True)).read_text()
    assert str(tmp_path / "view") in page and "The cost of the cache" not in page
