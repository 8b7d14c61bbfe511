"""What each example counts in the loss, and what is told of every language's losses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import relates_rows
from small_runs import make_language_cache, make_student_config, read_lines
from small_worlds import (
    HEADS,
    SIGNALS,
    TASK,
    WIDTHS,
    KeepGradients,
    V,
    assert_close,
    every_loss,
    make_example,
    make_student,
    make_trainer,
    name_loss,
)
from transformers import LlamaForCausalLM

from pipeline.accounts import ExampleWeights, Ledger, Marks, SliceMeans
from pipeline.batches import Collator
from pipeline.errors import ConfigError
from pipeline.examples import CachedExample
from pipeline.losses import Loss
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenMSE
from pipeline.losses.labels import CrossEntropy
from pipeline.outputs import read_knowledge
from pipeline.terms import (
    attach_projections,
    count_units,
    fuse_head,
    weigh_terms,
)
from stages.train_student import train_student

LANGUAGES = ("heb", "yor", "heb", "khm", "yor", "heb", "heb", "khm")
LOSS_CASES = pytest.mark.parametrize("loss", every_loss(), ids=name_loss)
SLICES = {"language": ["heb", "khm", "yor"]}


@pytest.fixture(scope="module")
def examples() -> list[CachedExample]:
    return [
        replace(make_example(number), columns={"language": language})
        for number, language in enumerate(LANGUAGES)
    ]


def weigh(**weights: float) -> Marks:
    return Marks(ExampleWeights(by="language", weights=weights))


def count_valid(loss: Loss, examples: list[CachedExample]) -> float:
    """What the sum of a loss over the examples is divided by."""
    return float(count_units([loss], Collator(TASK, 0, SIGNALS, HEADS)(examples))[0])


def make_model(losses: list[Loss]) -> LlamaForCausalLM:
    model = make_student()
    torch.manual_seed(1)
    attach_projections(model, losses, WIDTHS)
    return model


def enter(
    model: LlamaForCausalLM,
    losses: list[Loss],
    examples: list[CachedExample],
    marks: Marks,
    fused: bool = True,
) -> tuple[list[torch.Tensor], dict[str, Any], Ledger]:
    """Gradients of the weighed sum of a micro-batch, the batch, and its ledger."""
    batch = Collator(TASK, 0, SIGNALS, HEADS, marks=marks)(examples)
    factors = [torch.tensor(0.5) for _ in losses]
    ledger, head = Ledger(len(losses)), fuse_head(model, V) if fused else None
    total, _, _ = weigh_terms(model, batch, losses, factors, head, TASK, ledger)
    parameters = list(model.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    gradients = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in gradients], batch, ledger


@LOSS_CASES
def test_the_loss_is_the_weighted_sum_of_what_each_language_adds(
    examples: list[CachedExample], loss: Loss
) -> None:
    """What it is divided by does not change with the weights."""
    model = make_model([loss])
    factors = {"heb": 1.0, "khm": 0.5, "yor": 3.0}
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for name, factor in factors.items():
        alone = weigh(**{other: float(other == name) for other in factors})
        parts = enter(model, [loss], examples, alone)[0]
        expected = [whole + factor * part for whole, part in zip(expected, parts, strict=True)]
    found = enter(model, [loss], examples, weigh(khm=0.5, yor=3.0))[0]
    scale = max(float(gradient.norm()) for gradient in expected)
    assert scale > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).norm()) <= 1e-5 * scale


@pytest.mark.parametrize(
    "loss", [ForwardKL(temperature=2.0), CrossEntropy(), HiddenMSE(layers={1: -1})], ids=name_loss
)
def test_an_example_of_weight_two_teaches_what_two_would(
    examples: list[CachedExample], loss: Loss
) -> None:
    model = make_model([loss])
    twice = examples + [example for example in examples if example.columns["language"] == "yor"]
    found, expected = (
        enter(model, [loss], *given)[0] for given in ((examples, weigh(yor=2.0)), (twice, weigh()))
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_fused_head_weighs_and_keeps_what_plain_logits_do(
    examples: list[CachedExample],
) -> None:
    losses: list[Loss] = [ForwardKL(temperature=2.0), HiddenMSE(layers={1: -1}), CrossEntropy()]
    losses.append(ForwardKL())
    model, marks = make_model(losses), weigh(yor=3.0, khm=0.25)
    fused, plain = (enter(model, losses, examples, marks, fused) for fused in (True, False))
    for mine, theirs in zip(fused[0] + fused[2].values, plain[0] + plain[2].values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@LOSS_CASES
def test_the_terms_of_a_language_are_the_means_of_its_own_values(
    examples: list[CachedExample], loss: Loss
) -> None:
    """As they enter the loss, however the step is split."""
    model, marks = make_model([loss]), Marks(weigh(yor=3.0).weights, SLICES)
    means = SliceMeans(["it"], marks)
    halves = [examples] if relates_rows(loss) else [examples[:3], examples[3:]]
    for half in halves:
        _, batch, ledger = enter(model, [loss], half, marks)
        means.add([loss], batch, ledger, read_knowledge(batch))
    found = means.name(means.take())
    assert found.keys() == {f"term/it/language={name}" for name in SLICES["language"]}
    for language in SLICES["language"]:
        own = [example for example in examples if example.columns["language"] == language]
        if relates_rows(loss) and loss.unit == "examples":
            continue  # related to examples of other languages
        values = enter(model, [loss], own, marks)[2].values[0]
        expected = float(values.sum()) / count_valid(loss, own) / loss.gradient_scale
        assert found[f"term/it/language={language}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not means.name(means.take())  # taken


def test_steps_and_logged_terms_do_not_depend_on_the_split_into_micro_batches(
    tmp_path: Path, examples: list[CachedExample]
) -> None:
    losses: list[Loss] = [ForwardKL(temperature=2.0), CrossEntropy(), HiddenMSE(layers={1: -1})]
    marks = Marks(weigh(yor=3.0, khm=0.5).weights, SLICES)
    steps, lines = [], []
    for size in (8, 2):
        kept, folder = KeepGradients(), tmp_path / str(size)
        folder.mkdir()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = make_trainer(
            folder, losses, examples, callbacks=[kept], marks=marks, max_steps=1, **settings
        )
        trainer.train()
        steps.append(kept.steps[0])
        lines += [line for line in read_lines(folder) if "loss" in line]
    assert_close(steps[0], steps[1], 1e-5)
    assert len([name for name in lines[0] if "language=" in name]) == 9
    for name, value in lines[0].items():
        if name.startswith("term/"):
            assert lines[1][name] == pytest.approx(value, rel=1e-4)


def test_weights_are_a_factor_on_the_shares_of_every_teacher(
    examples: list[CachedExample],
) -> None:
    counts = torch.tensor([len(example.label_ids) for example in examples])
    weights = torch.tensor([{"yor": 3.0}.get(language, 1.0) for language in LANGUAGES])
    first = {"targets": torch.rand(int(counts.sum()))}
    batch = {"shares": first, "teachers": {"other": {"hidden": {}}}}
    found = weigh(yor=3.0).mark(batch, examples, counts)
    by_target = weights.repeat_interleave(counts)
    assert torch.equal(found["shares"]["targets"], first["targets"] * by_target)
    for shares in (found["shares"], found["teachers"]["other"]["shares"]):
        assert torch.equal(shares["examples"], weights)
        assert torch.equal(shares["features"], by_target)
    assert found["teachers"]["other"].keys() == {"hidden", "shares"}


def test_a_run_logs_every_languages_terms_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    cache = make_language_cache(tmp_path)
    settings: dict[str, Any] = {
        "losses": [{"name": "forward_kl"}, {"name": "cross_entropy"}],
        "log_slices": ["split"],
        "training": {"logging_steps": 1, "max_steps": 2},
    }
    terms = []
    for weight in (1.0, 0.5):
        settings["example_weights"] = {"by": "split", "weights": {"train": weight}}
        output = tmp_path / f"run {weight}"
        run = train_student(make_student_config(cache, output, **settings))
        lines = [line for line in read_lines(run) if "loss" in line]
        for line in lines:
            for term in ("term/forward_kl", "term/cross_entropy"):
                assert line[f"{term}/split=train"] == pytest.approx(line[term], rel=1e-5)
        terms.append(lines[0]["term/forward_kl"])
    assert terms[1] == pytest.approx(0.5 * terms[0], rel=1e-5)
    settings["example_weights"] = {"by": "split", "weights": {"trian": 2.0}}
    with pytest.raises(ConfigError, match="no split is 'trian'; did you mean 'train'"):
        train_student(make_student_config(cache, tmp_path / "other", **settings))
