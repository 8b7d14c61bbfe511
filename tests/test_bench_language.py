"""The bench's own language models: they learn, are kept under their recipe, and answer the same."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from stages.bench.language import LanguageRecipe, ask_language, train_language

RECIPE = LanguageRecipe(classes=400, packages=(), files=60, width=32, layers=1, steps=150)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_a_model_knows_more_than_how_often_classes_come(models: Path) -> None:
    logits, following = zip(*ask_language(models, RECIPE, 1000), strict=True)
    log_probs, labels = torch.cat(logits).log_softmax(dim=1), torch.cat(following)
    assert log_probs.shape == (1000, 400)
    shares = torch.bincount(labels, minlength=400) / len(labels)
    best_without_context = -float((shares[labels]).log().mean())
    assert -float(log_probs.gather(1, labels[:, None]).mean()) < best_without_context


def test_a_recipe_is_trained_once_and_another_apart(models: Path) -> None:
    path = train_language(models, RECIPE)
    weights = path / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert train_language(models, RECIPE) == path
    assert weights.stat().st_mtime_ns == written
    assert RECIPE.model_copy(update={"steps": 151}).digest != RECIPE.digest


def test_training_again_gives_the_same_model(models: Path, tmp_path: Path) -> None:
    first = train_language(models, RECIPE) / "model.safetensors"
    second = train_language(tmp_path, RECIPE) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_a_sharpened_model_is_surer_of_the_same_order_of_contexts(models: Path) -> None:
    plain, _ = next(ask_language(models, RECIPE, 10))
    sharp, _ = next(ask_language(models, RECIPE, 10, sharpening=3.0))
    assert float(sharp.softmax(1).amax(1).mean()) > float(plain.softmax(1).amax(1).mean())
    same, _ = next(ask_language(models, RECIPE, 10, sharpening=1.0))
    assert torch.equal(plain, same)


def test_asking_for_more_text_than_there_is_says_what_there_is(models: Path) -> None:
    with pytest.raises(DataError, match=r"has [\d,]+ tokens, asked for 10,000,000; lower"):
        list(ask_language(models, RECIPE, 10**7))


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"packages": ("numpy", "no_such_package")})
    with pytest.raises(DataError, match="'no_such_package' is not installed; install it"):
        train_language(tmp_path, recipe)
