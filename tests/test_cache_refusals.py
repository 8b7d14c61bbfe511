"""An example that does not fit is refused by name, before it is on the shelf."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_examples import SIGNALS, make_draft, make_example, make_targets, write_cache

from pipeline.cache import Draft, Signal, TargetsSpec, require_same
from pipeline.cache.signals.quantization import ENCODINGS
from pipeline.errors import ConfigError, DataError, MismatchError, NumericalError
from pipeline.examples import CachedExample


def other_targets(example: CachedExample, draft: Draft, labels: np.ndarray) -> CachedExample:
    logits = np.random.default_rng(0).normal(size=(len(labels), draft.num_classes))
    return replace(example, targets=make_targets(logits, labels, draft, 0))


def broken_examples() -> dict[str, tuple[CachedExample, type[Exception], str]]:
    draft = make_draft(1, signals=SIGNALS)
    good = make_example(5, draft, tokens=6)
    targets = good.targets
    logits, twice, outside = targets.logits.clone(), targets.ids.clone(), targets.ids.clone()
    logits[2, 1], twice[1, 0], outside[0, 0] = float("nan"), twice[1, 1], 50
    shifted = np.roll(good.label_ids, 1)
    hidden = dict(good.hidden)
    huge = torch.full_like(hidden["layer.0"], 1e5)
    return {
        "a target short": (
            other_targets(good, draft, good.label_ids[:4]),
            DataError,
            r"shape of targets.ids is \[4, 8\], expected \[5, 8\]",
        ),
        "nan": (replace(good, targets=replace(targets, logits=logits)), NumericalError, "logits"),
        "a class twice": (
            replace(good, targets=replace(targets, ids=twice)),
            DataError,
            "kept twice",
        ),
        "outside": (replace(good, targets=replace(targets, ids=outside)), DataError, "outside"),
        "a vector short": (
            replace(good, hidden=hidden | {"layer.-1": hidden["layer.-1"][:4]}),
            DataError,
            r"hidden layer.-1 has shape \[4, 6\], expected \[5 or 6, 6\]",
        ),
        "no signal": (replace(good, hidden={}), DataError, "hidden signals"),
        "too large": (
            replace(good, hidden=hidden | {"layer.0": huge}),
            NumericalError,
            "of float16; try",
        ),
        "other columns": (replace(good, columns={"split": "x"}), DataError, "columns"),
        "wrong type": (
            replace(good, columns={"split": "x", "weight": "heavy"}),
            DataError,
            "'weight'",
        ),
        "segments": (
            replace(good, segment_lengths=np.array([3, 4], dtype=np.int32)),
            DataError,
            "segment_lengths is 7, expected 6",
        ),
        "unshifted": (
            other_targets(replace(good, label_ids=shifted), draft, shifted),
            DataError,
            "token t",
        ),
        "other labels": (replace(good, label_ids=shifted), DataError, "label_ids"),
        "other temperatures": (
            replace(good, targets=replace(targets, temperatures=(1.0, 3.0))),
            DataError,
            "temperatures",
        ),
    }


@pytest.mark.parametrize("name", broken_examples())
def test_an_example_that_does_not_fit_is_refused_by_name(tmp_path, name):
    example, error, message = broken_examples()[name]
    draft = make_draft(1, signals=SIGNALS)
    with pytest.raises(error, match=message) as caught:
        write_cache(tmp_path, draft, [example])
    if name != "wrong type":
        assert "text-5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_kept_is_refused_with_the_config():
    for settings, message in [
        ({"top_k": 51}, "51 is more than the 50 classes"),
        ({"top_k": "all", "tail_draws": 3}, "leaves no tail"),
    ]:
        with pytest.raises(ConfigError, match=message):
            TargetsSpec(**settings).resolve(50)
    with pytest.raises(ConfigError, match="2,000,000 classes"):
        TargetsSpec().resolve(2_000_000)
    with pytest.raises(ValueError, match="keeps nothing"):
        TargetsSpec(top_k=0)
    assert TargetsSpec(top_k="all").resolve(7).top_k == 7
    with pytest.raises(DataError, match="column 'input_ids'"):
        write_cache(Path("unused"), make_draft(1, columns={"input_ids": "string"}))


@pytest.mark.parametrize("dtype", ENCODINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused_in_every_dtype(tmp_path, dtype, value):
    draft = make_draft(1, signals={"layer.0": Signal(width=4, dtype=dtype)})
    example = make_example(0, draft)
    example.hidden["layer.0"][1, 2] = value
    with pytest.raises(NumericalError, match=r"'text-0': hidden layer.0 holds NaN or numbers"):
        write_cache(tmp_path, draft, [example])


def test_what_brings_other_differences_with_it_is_named_first(tmp_path: Path) -> None:
    one = {"columns": 1, "identity": {"data": {"digest": "a"}, "teacher": {"digest": "b"}}}
    one |= {"num_classes": 3, "signals": {"pooled": 1}, "task": {"labels": 1, "name": "tags"}}
    other = {"identity": {"teacher": {"name": "c"}}, "task": {"name": "texts"}}
    with pytest.raises(MismatchError) as caught:
        require_same(tmp_path, one, other, "Mend it")
    told = re.findall(r"cached with (\S+)", str(caught.value))
    assert told == ["identity.teacher.name", "task.name", "columns", "identity.data"]
    assert str(caught.value).endswith(", and 4 fields more. Mend it")
