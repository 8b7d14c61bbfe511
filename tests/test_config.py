"""Configs: overrides, unknown keys with the nearest name, one-line errors, a round trip."""

from pathlib import Path
from typing import Annotated

import pytest

from pipeline.config import StrictModel, dump_config, load_config, member_of
from pipeline.errors import ConfigError
from pipeline.losses import LOSSES
from pipeline.losses.base import Loss


class Inner(StrictModel):
    rate: float = 0.1
    names: list[str] = []


class Outer(StrictModel):
    inner: Inner = Inner()
    count: int
    losses: list[Annotated[Loss, *member_of(LOSSES, "loss")]] = []
    free: dict[str, object] = {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("count: 3\nlosses:\n  - {name: forward_kl, weight: 0.9}\n", encoding="utf-8")
    return path


def test_a_config_is_read_with_its_defaults(file: Path) -> None:
    config = load_config(Outer, file)
    assert (config.count, config.inner.rate, config.losses[0].name) == (3, 0.1, "forward_kl")


def test_overrides_reach_into_sections_and_lists(file: Path) -> None:
    wanted = ["inner.rate=5e-3", "losses.0.weight=0.5", "inner.names=[a, b]", "free.steps=7"]
    config = load_config(Outer, file, wanted)
    assert config.inner.rate == 0.005
    assert config.losses[0].weight == 0.5
    assert config.inner.names == ["a", "b"]
    assert config.free == {"steps": 7}


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E5", 1e5), ("-2e+3", -2e3)])
def test_numbers_without_a_point_are_numbers(file: Path, text: str, value: float) -> None:
    assert load_config(Outer, file, [f"free.x={text}"]).free["x"] == value


def test_a_resolved_config_reads_back_as_itself(file: Path) -> None:
    config = load_config(Outer, file, ["inner.rate=0.7"])
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Outer, file) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.raet=1", r"unknown key 'inner.raet'; did you mean 'rate'\?"),
        ("cuont=1", r"unknown key 'cuont'; did you mean 'count'\?"),
        ("losses.0.wieght=1", r"unknown key .*wieght'; did you mean 'weight'\?"),
        (
            "losses.0.name=forward_lk",
            r"loss 'forward_lk' is not known; did you mean 'forward_kl'\?",
        ),
        ("losses.4.weight=1", r"'4' is no index into a list of 1"),
        ("count=many", r"count: .*integer.*found 'many'"),
        ("count.deep=1", r"count is a plain value, .*; set all of it, .*\{name: 3, deep: 1\}"),
        ("count", r"expected section.key=value"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        load_config(Outer, file, [override])
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_named(file: Path) -> None:
    file.write_text("inner: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config.yaml: count is missing"):
        load_config(Outer, file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("a: [", "no valid YAML"),
        ("- 1", "holds list, expected a mapping"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as raised:
        load_config(Outer, path)
    assert "\n" not in str(raised.value)
