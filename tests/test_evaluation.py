"""Held-out measurement: every figure from its definition, whatever the batches and the slices."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_worlds import TASK, ask, make_example, make_student
from torch.nn import functional

from pipeline.batches import Collator, Selection
from pipeline.evaluation import measure, score_model, teacher_scores
from pipeline.examples import CachedExample, Example
from pipeline.metrics import Metric
from pipeline.scores import Scores


@pytest.fixture(scope="module")
def examples() -> list[CachedExample]:
    """What a teacher of another seed says, in two languages."""
    torch.manual_seed(5)
    teacher = make_student(num_hidden_layers=1).eval()
    asked = [ask(teacher, make_example(number)) for number in range(7)]
    languages = ("en", "yor")
    return [replace(e, columns={"language": languages[i % 2]}) for i, e in enumerate(asked)]


def score(examples: Sequence[Example], batch_size: int = 3) -> Scores:
    model = make_student().eval()
    return score_model(model, Selection(examples), Collator(TASK, 0), batch_size)


def by_name(metrics: list[Metric], which: str = "all") -> dict[str, float]:
    return {metric.name: metric.value for metric in metrics if metric.slice == which}


def test_every_figure_is_its_definition(examples: list[CachedExample]) -> None:
    model = make_student().eval()
    own, said, labels = [], [], []
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad():
            own.append(model(input_ids=ids).logits[0, :-1, :40].log_softmax(1))
        teacher = example.targets.at(1.0)
        said.append(torch.empty(len(ids[0]) - 1, 40).scatter_(1, teacher.ids, teacher.log_probs))
        labels.append(ids[0, 1:])
    q, p, y = torch.cat(own), torch.cat(said), torch.cat(labels)
    found = by_name(measure(TASK, score(examples)))
    loss = float(functional.nll_loss(q, y))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert found["kl_to_teacher"] == pytest.approx(
        float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4
    )
    same = (q.argmax(1) == p.argmax(1)).float().mean()
    assert found["agreement"] == pytest.approx(100 * float(same), rel=1e-5)
    assert found["accuracy"] == pytest.approx(100 * float((q.argmax(1) == y).float().mean()))
    teachers = by_name(measure(TASK, teacher_scores(Selection(examples))))
    assert teachers["loss"] == pytest.approx(float(functional.nll_loss(p, y)), rel=1e-5)
    assert teachers["accuracy"] == pytest.approx(100 * float((p.argmax(1) == y).float().mean()))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_nothing(examples: list[CachedExample], batch_size: int) -> None:
    one, other = score(examples), score(examples, batch_size)
    np.testing.assert_array_equal(one.label_ids, other.label_ids)
    np.testing.assert_allclose(one.kl_to_teacher, other.kl_to_teacher, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 150])
def test_logits_are_read_in_pieces_that_change_nothing(
    examples: list[CachedExample], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(examples)
    monkeypatch.setattr("pipeline.evaluation._ELEMENTS", elements)
    pieces = score(examples)
    for name in ("label_ids", "predictions", "agreement"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))
    for name in ("confidence", "label_log_probs", "kl_to_teacher"):
        found, expected = getattr(pieces, name), getattr(whole, name)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_slices_are_the_figures_of_their_examples(examples: list[CachedExample]) -> None:
    found = measure(TASK, score(examples), ["language"])
    for language, own in (("en", examples[::2]), ("yor", examples[1::2])):
        expected = by_name(measure(TASK, score(own)))
        assert by_name(found, f"language={language}") == pytest.approx(expected, rel=1e-5)


def test_examples_without_a_teacher_are_measured_on_labels_alone() -> None:
    cached = make_example(2)
    names = ("example_id", "input_ids", "segment_lengths", "target_positions", "label_ids")
    found = by_name(measure(TASK, score([Example(*(getattr(cached, name) for name in names))])))
    assert set(found) == {"loss", "perplexity", "accuracy", "ece"}


def test_a_cache_of_draws_alone_has_a_teacher_too() -> None:
    example = make_example(4, top_k=0, tail_draws=200)
    whole = make_example(4, top_k=40, tail_draws=0)
    drawn, exact = (teacher_scores(Selection([e])) for e in (example, whole))
    np.testing.assert_array_equal(drawn.predictions, exact.predictions)
    np.testing.assert_allclose(drawn.confidence, exact.confidence, rtol=1e-5)
    assert "agreement" not in by_name(measure(TASK, score([example])))  # not known exactly


def test_measuring_leaves_the_models_configuration_alone(examples: list[CachedExample]) -> None:
    model = make_student().eval()
    before = dict(vars(model.config))
    score_model(model, Selection(examples), Collator(TASK, 0), 2)
    assert dict(vars(model.config)) == before
    del model.config.__dict__["use_cache"]
    score_model(model, Selection(examples), Collator(TASK, 0), 2)
    assert "use_cache" not in vars(model.config)
