"""A training stops when what it watches gets no better, on the slice and in the direction meant."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import read_lines
from small_teachers import make_tokenizer
from small_worlds import SIGNALS, TASK, make_example, make_student

from pipeline.arguments import EarlyStopping, EvaluationConfig
from pipeline.batches import Collator, Selection
from pipeline.errors import ConfigError
from pipeline.losses.divergences import ForwardKL
from pipeline.staging import TrainingStage
from pipeline.training import Outcome, train_model


def learn(output: Path, rate: float = 0.03, **evaluation: Any) -> Outcome:
    """Up to forty steps on examples of two languages, measured after each."""
    languages = ("yor_Latn", "eng_Latn", "eng_Latn")
    examples = Selection(
        [
            replace(make_example(n), columns={"split": "train", "language": languages[n % 3]})
            for n in range(9)
        ]
    )
    model = make_student()
    stage = TrainingStage(
        losses=[ForwardKL()],
        train=examples,
        collator=Collator(TASK, 0, SIGNALS),
        training={
            "learning_rate": rate,
            "max_steps": 40,
            "per_device_train_batch_size": 9,
            "use_cpu": True,
        },
    )
    settings = EvaluationConfig(every=1, slices=["language"], **evaluation)
    return train_model(model, TASK, [stage], {"test": examples}, make_tokenizer(), settings, output)


@pytest.mark.parametrize(
    ("metric", "slice", "best"),
    [
        ("agreement", "all", np.argmax),
        ("agreement", "language=yor_Latn", np.argmax),
        ("kl_to_teacher", "language=eng_Latn", np.argmin),
    ],
)
def test_the_best_of_a_slice_is_kept_whichever_way_is_better(
    tmp_path: Path, metric: str, slice: str, best: Any
) -> None:
    stopping = EarlyStopping(metric=metric, slice=slice, patience=2)
    outcome = learn(tmp_path, rate=0.3, early_stopping=stopping)
    curve = [line[stopping.key] for line in read_lines(tmp_path) if line["split"] == "eval"]
    assert len(curve) == outcome.taken.steps == best(curve) + 3 < 40
    [kept] = [m for m in outcome.metrics if (m.name, m.slice) == (metric, slice)]
    assert kept.value == pytest.approx(curve[best(curve)], rel=1e-5)


def test_slices_are_on_the_curve_where_they_are_asked_for(tmp_path: Path) -> None:
    learn(tmp_path / "plain")
    outcome = learn(tmp_path / "sliced", curve_slices=["language"])
    assert not any("/language" in key for line in read_lines(tmp_path / "plain") for key in line)
    last = read_lines(tmp_path / "sliced")[-1]
    for metric in outcome.metrics:
        assert last[metric.key] == pytest.approx(metric.value, rel=1e-5)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            {"early_stopping": {"slice": "language=yor_Latin"}},
            "metric 'loss/language=yor_Latin' is not measured; did you mean 'loss/language=yor_L",
        ),
        ({"early_stopping": {"slice": "langage=x"}}, "column 'langage'; did you mean 'language'"),
        ({"curve_slices": ["langage"]}, "evaluation.curve_slices: no example has a column 'langag"),
        ({"early_stopping": {"metric": "tokens"}}, "'tokens' is not measured; choose from"),
    ],
)
def test_what_is_not_measured_cannot_be_watched(
    tmp_path: Path, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        learn(tmp_path, **evaluation)
