"""Hidden states at some positions only: what is kept, and that a student learns from just these."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import make_language_cache, make_student_config, make_topic_cache, read_lines
from small_worlds import SIGNALS, TASK, WIDTHS, make_example, make_student
from torch import nn

from pipeline.batches import COUNTED, Collator
from pipeline.cache import TeacherCache
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.examples import CachedExample, Example
from pipeline.losses import HiddenCosine, HiddenMSE, Knowledge
from pipeline.losses.hidden import HiddenLoss
from pipeline.losses.relations import Gram
from pipeline.outputs import run_student
from pipeline.positions import Every, Positions, pick_positions
from pipeline.reading import open_reading
from pipeline.targets import UNLABELLED
from pipeline.terms import attach_projections, projections_of, weigh_terms
from stages.cache_teacher import CacheConfig
from stages.shipped import CONFIGS
from stages.train_student import train_student

CHOICES: tuple[Positions, ...] = (
    "all",
    "labelled",
    "first",
    "last",
    Every(every=2),
    Every(every=3),
)
each = pytest.mark.parametrize("positions", CHOICES, ids=str)


def document(lengths: Sequence[int], targets: Sequence[int], labels: Sequence[int]) -> Example:
    return Example(
        example_id="a",
        input_ids=np.zeros(sum(lengths), dtype=np.int32),
        segment_lengths=np.array(lengths, dtype=np.int32),
        target_positions=np.array(targets, dtype=np.int32),
        label_ids=np.array(labels, dtype=np.int32),
    )


def pick(example: Example, positions: Positions) -> list[int]:
    found: list[int] = pick_positions(example.target_positions, example, positions).tolist()
    return found


def test_what_is_kept_of_two_packed_documents() -> None:
    example = document([5, 1, 4], [0, 1, 2, 3, 6, 7], [4, UNLABELLED, 6, 7, 8, UNLABELLED])
    assert pick(example, "all") == [0, 1, 2, 3, 6, 7]
    assert pick(example, "labelled") == [0, 2, 3, 6]
    assert pick(example, "first") == [0]
    assert pick(example, "last") == [3, 7]
    assert pick(example, Every(every=2)) == [1, 3, 7]
    assert pick(example, Every(every=4)) == [2]
    tokens = np.arange(10)
    assert pick_positions(tokens, example, "last").tolist() == [4, 5, 9]
    assert pick_positions(tokens, example, "labelled").tolist() == [0, 2, 3, 6]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(2, 7), st.data())
def test_every_choice_is_some_of_the_positions_in_their_order(
    lengths: list[int], every: int, data: st.DataObject
) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    targets = np.flatnonzero(mask).tolist()
    example = document(lengths, targets, targets)
    for positions in (*CHOICES, Every(every=every)):
        found = pick(example, positions)
        assert set(found) <= set(targets)
        assert found == sorted(set(found))
    assert pick(example, "labelled") == targets == pick(example, "all")
    assert abs(len(pick(example, Every(every=every))) - len(targets) / every) <= 0.5


@each
@pytest.mark.parametrize("loss", [HiddenMSE(layers={1: 2}), HiddenCosine(layers={1: 2, 2: -1})])
def test_a_loss_over_some_positions_is_the_mean_over_just_these(
    positions: Positions, loss: HiddenLoss
) -> None:
    whole = [make_example(number) for number in range(6)]
    model = make_student()
    torch.manual_seed(1)
    attach_projections(model, [loss], WIDTHS)

    batch = Collator(TASK, 0, SIGNALS)(whole)
    _, student = run_student(model, batch, [loss], TASK)
    knowledge = Knowledge(batch["targets"], batch["label_ids"], batch["hidden"])
    learned = projections_of(model)["0"]
    assert isinstance(learned, nn.ModuleDict)
    values = loss.per_position(student, knowledge, learned)
    kept = torch.from_numpy(np.concatenate([kept_rows(e, positions) for e in whole]))
    expected = values[kept].mean()
    expected.backward()  # type: ignore[no-untyped-call]
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()

    some = [with_rows(example, kept_rows(example, positions)) for example in whole]
    batch = Collator(TASK, 0, SIGNALS, positions=positions)(some)
    count = batch["counts"][COUNTED.index("features")]
    assert int(count) == int(kept.sum())
    found, _, _ = weigh_terms(model, batch, [loss], [1.0 / count], None, TASK)
    found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient)


def kept_rows(example: Example, positions: Positions) -> np.ndarray:
    return np.isin(example.target_positions, pick(example, positions))


def with_rows(example: CachedExample, rows: np.ndarray) -> CachedExample:
    index = torch.from_numpy(rows)
    hidden = {n: v if n == "pooled" else v[index] for n, v in example.hidden.items()}
    return replace(example, hidden=hidden)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return TeacherCache.open(make_language_cache(tmp_path_factory.mktemp("all")))


@pytest.mark.parametrize("positions", ["labelled", "last", {"every": 3}], ids=str)
def test_a_cache_of_some_positions_has_their_rows_and_teaches(
    positions: Any, language: TeacherCache, tmp_path: Path
) -> None:
    hidden = {"layers": [0, -1], "dtype": "float32", "positions": positions}
    path = make_language_cache(tmp_path / "some", hidden=hidden)
    cache = TeacherCache.open(path)
    choice = cache.manifest.positions
    for row in range(len(cache)):
        whole, some = language[row], cache[row]
        kept = torch.from_numpy(kept_rows(whole, choice))
        for name in ("layer.0", "layer.2"):
            torch.testing.assert_close(some.hidden[name], whole.hidden[name][kept])
    assert cache.manifest.totals.features <= language.manifest.totals.features
    losses = [{"name": "hidden_mse", "layers": {1: -1}}]
    config = make_student_config(
        path, tmp_path / "run", losses=losses, training={"max_steps": 1, "logging_steps": 1}
    )
    assert read_lines(train_student(config))[0]["term/hidden_mse"] > 0


def test_a_classifiers_kept_positions_are_counted_among_all_tokens(tmp_path: Path) -> None:
    hidden = {"layers": [-1], "pooled": True, "positions": "last"}
    cache = TeacherCache.open(make_topic_cache(tmp_path, hidden=hidden))
    for row in (0, 3):
        assert cache[row].hidden["layer.2"].shape[0] == len(cache[row].segment_lengths)
        assert cache[row].hidden["pooled"].shape[0] == 1
    reading = open_reading(cache, None, None, "the-student")
    assert reading.collator([HiddenMSE(layers={1: -1}), Gram(pooled=True)]).positions == "last"
    with pytest.raises(ConfigError, match=r"gram relates .* keeps the last one alone; use pooled"):
        reading.collator([Gram(layers={1: -1})])


@pytest.mark.parametrize(
    ("positions", "complaint"),
    [
        ("frist", r"hidden.positions: expected all, labelled, first, last, or every: a number"),
        ("{every: 1}", "positions: every: .* greater than or equal to 2"),
        ("{evry: 3}", "positions: "),
    ],
)
def test_unknown_positions_are_refused_in_one_line(positions: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(CacheConfig, CONFIGS / "cache" / "demo.yaml", [f"hidden.positions={positions}"])
    assert "\n" not in str(caught.value)
