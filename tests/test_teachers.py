"""Several teachers: their losses add up, by fixed weights, by language, or by confidence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, make_data, make_language_cache, make_student_config, make_topic_cache
from small_teachers import make_bert, make_llama, make_tokenizer, save_teacher
from small_worlds import weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.cache import TeacherCache
from pipeline.config import parse_config
from pipeline.errors import ConfigError, MismatchError
from pipeline.losses import LOSSES, Loss
from pipeline.reading import open_reading
from pipeline.runs import read_curve
from pipeline.targets import Targets
from pipeline.tasks.causal_lm import CausalLM
from pipeline.teachers import Company, FurtherTeachers, make_company
from pipeline.terms import attach_projections, fuse_head, name_terms, weigh_terms
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.train_student import train_student

V = 300
TASK = CausalLM(block_size=32)


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches of one text, by two language models of other depths."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    first = make_language_cache(one)
    torch.manual_seed(1)
    other = make_llama(num_hidden_layers=3)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    save_teacher(two / "teacher", other)
    config = CacheConfig.model_validate(
        {
            "output": str(two / "cache"),
            "task": {"name": "causal-lm", "block_size": 32},
            "data": make_data(one),
            "teacher": {"model": str(two / "teacher")},
            "targets": {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"},
            "hidden": {"layers": [-1], "dtype": "float32"},
        }
    )
    return first, cache_teacher(config, progress=False)


def make_terms(
    caches: tuple[Path, Path], losses: list[dict[str, Any]], **section: Any
) -> tuple[list[Loss], Company, dict[str, Any]]:
    """All terms, the company, and a batch of two examples."""
    first, second = (TeacherCache.open(path) for path in caches)
    share = {"cache": str(caches[1]), **section.pop("share", {})}
    teachers = parse_config(FurtherTeachers, {"caches": {"two": share}, **section}, "teachers")
    reading = open_reading(first, None, None, "student")
    terms = teachers.expand([LOSSES[loss["name"]].model_validate(loss) for loss in losses])
    company = make_company(teachers, reading, {"two": second}, terms)
    collator = reading.collator([loss for loss in terms if loss.teacher is None])
    examples = [first[0], first[3]]
    batch = collator(examples)
    return terms, company, batch | company.ask(examples, batch["targets"])


def make_student(classes: int = 304) -> Any:
    torch.manual_seed(7)
    return make_llama(num_hidden_layers=1, vocab_size=classes)


def dense(targets: Targets) -> Tensor:
    """Probabilities of every class, [N, V]."""
    sparse = targets.at(1.0)
    return torch.zeros(len(targets), V).scatter_(1, sparse.ids, sparse.log_probs.exp())


def test_two_teachers_are_learned_as_their_mixture(languages: tuple[Path, Path]) -> None:
    terms, _, batch = make_terms(languages, [{"name": "forward_kl"}], share={"weight": 3.0})
    assert name_terms(terms) == ["forward_kl", "forward_kl@two"]
    student = make_student()
    attach_projections(student, terms, {})
    factors = [torch.tensor(1.0)] * 2
    total, _, _ = weigh_terms(student, batch, terms, factors, None, TASK)
    found = torch.autograd.grad(total, list(student.parameters()))
    logits = student(**batch["inputs"]).logits.flatten(0, 1)[batch["target_index"], :V]
    mixture = dense(batch["targets"]) + 3.0 * dense(batch["teachers"]["two"]["targets"])
    wanted = -(mixture * logits.log_softmax(1)).sum()
    for own, theirs in zip(
        found, torch.autograd.grad(wanted, list(student.parameters())), strict=True
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combine", ["fixed", "confidence"])
def test_the_fused_head_listens_to_every_teacher(
    languages: tuple[Path, Path], combine: str
) -> None:
    losses = [{"name": "forward_kl"}, {"name": "cross_entropy"}]
    terms, _, batch = make_terms(languages, losses, combine=combine, share={"weight": 0.5})
    student = make_student()
    attach_projections(student, terms, {})
    factors = [torch.tensor(0.5), torch.tensor(0.25), torch.tensor(2.0)]
    answers = []
    for head in (fuse_head(student, V), None):
        total, sums, _ = weigh_terms(student, batch, terms, factors, head, TASK)
        gradients = torch.autograd.grad(total, list(student.parameters()))
        answers.append([total.detach(), sums, *gradients])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_confidence_shares_the_weights_in_proportion(languages: tuple[Path, Path]) -> None:
    _, _, batch = make_terms(
        languages, [{"name": "forward_kl"}], combine="confidence", share={"weight": 0.5}
    )
    two = batch["teachers"]["two"]
    for unit in ("targets", "labels", "examples"):
        total = batch["shares"][unit] + two["shares"][unit]
        torch.testing.assert_close(total, torch.full_like(total, 1.5))
    ratio = two["shares"]["targets"] / batch["shares"]["targets"]
    trust = two["targets"].confidence() / batch["targets"].confidence()
    torch.testing.assert_close(ratio, 0.5 * trust)


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches of one data set, by two classifiers with tokenizers of their own."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    first = make_topic_cache(one)
    model = make_bert()
    with torch.no_grad():
        model.classifier.weight.neg_()
    save_teacher(two / "teacher", model, make_tokenizer(model_max_length=20))
    data = {**make_data(one), "carry": ["text", "language"]}
    config = CacheConfig.model_validate(
        {
            "output": str(two / "cache"),
            "task": {"name": "sequence-classification"},
            "data": data,
            "teacher": {"model": str(two / "teacher")},
            "targets": {"top_k": "all", "temperatures": [1.0, 2.0]},
            "hidden": {"pooled": True, "dtype": "float32"},
        }
    )
    return first, cache_teacher(config, progress=False)


def train(caches: tuple[Path, Path], folder: Path, **changes: Any) -> Mapping[str, Tensor]:
    config = make_student_config(
        caches[0],
        folder,
        student={"from": "scratch", "architecture": "bert", **TINY},
        training={"max_steps": 3, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1},
        **changes,
    )
    run = train_student(config)
    return weights(AutoModelForSequenceClassification.from_pretrained(run))


def test_a_second_teacher_that_counts_nothing_changes_nothing(
    topics: tuple[Path, Path], tmp_path: Path
) -> None:
    losses = [{"name": "forward_kl"}, {"name": "hidden_mse", "pooled": True}]
    alone = train(topics, tmp_path / "alone", losses=losses)
    share = {"cache": str(topics[1]), "by": "language", "weights": {"en": 0.0}}
    silent = train(
        topics, tmp_path / "silent", losses=losses, further_teachers={"caches": {"b": share}}
    )
    heard = train(
        topics,
        tmp_path / "heard",
        losses=losses,
        further_teachers={"caches": {"b": {**share, "weights": {"de": 0.0}}}},
    )
    torch.testing.assert_close(dict(silent), dict(alone))
    assert any(not torch.allclose(heard[name], value) for name, value in alone.items())
    logged = read_curve(tmp_path / "heard")[0]
    assert {"term/forward_kl", "term/forward_kl@b", "term/hidden_mse@b"} <= set(logged)


def test_a_loss_may_listen_to_one_teacher_alone(topics: tuple[Path, Path], tmp_path: Path) -> None:
    losses = [{"name": "forward_kl", "teacher": "b"}]
    further = {"caches": {"b": {"cache": str(topics[1])}}}
    train(topics, tmp_path / "b", losses=losses, further_teachers=further)
    terms = {name for name in read_curve(tmp_path / "b")[0] if name.startswith("term/")}
    assert terms == {"term/forward_kl@b"}
    with pytest.raises(ConfigError, match="names the teacher 'c'; further_teachers are b, and"):
        train(
            topics,
            tmp_path / "c",
            losses=[{"name": "forward_kl", "teacher": "c"}],
            further_teachers=further,
        )


def test_teachers_that_do_not_belong_together_are_refused(
    languages: tuple[Path, Path], topics: tuple[Path, Path], tmp_path: Path
) -> None:
    losses = [{"name": "forward_kl"}]
    with pytest.raises(MismatchError, match="holds targets of sequence-classification"):
        make_terms((languages[0], topics[0]), losses)
    other = make_language_cache(tmp_path, task={"name": "causal-lm", "block_size": 24})
    with pytest.raises(MismatchError, match="read other tokens of example"):
        make_terms((languages[0], other), losses)


def test_a_student_of_two_language_models_is_an_ordinary_run(
    languages: tuple[Path, Path], tmp_path: Path
) -> None:
    config = make_student_config(
        languages[0],
        tmp_path / "run",
        losses=[
            {"name": "forward_kl", "temperature": 2.0},
            {"name": "hidden_mse", "layers": {-1: -1}},
        ],
        further_teachers={"caches": {"two": {"cache": str(languages[1])}}},
        training={"max_steps": 4},
    )
    run = train_student(config)
    assert AutoModelForCausalLM.from_pretrained(run).config.num_hidden_layers == 1
