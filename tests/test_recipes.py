"""The shipped recipes from end to end by the command line, smaller: same configs, same order.

teacher -> cache -> students -> comparison, with data and sizes that one thread learns in seconds
"""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from small_languages import SPLITS, read_languages, write_encoder, write_languages
from small_library import write_library
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner

from pipeline.cache import TeacherCache
from pipeline.config import load_config
from pipeline.examples import CachedExample
from pipeline.reading import Reading
from pipeline.runs import Result, read_curve, read_result
from pipeline.sources.sib200 import LANGUAGES
from pipeline.targets import UNLABELLED
from stages.cli import app
from stages.train_student import StudentConfig, read_cache

LOW_RESOURCE = LANGUAGES[12:]


def run_command(*arguments: str, **settings: object) -> str:
    """Run one command of the project with settings that override its config's."""
    options = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    given = [part for option in options for part in ("--set", option)]
    result = CliRunner().invoke(app, [*arguments, *given], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Commands run where no file of the project lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
        yield patch


@pytest.fixture(scope="module")
def topics(workplace: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the recipe sib200 ran, over made-up languages."""
    root = tmp_path_factory.mktemp("sib200")
    workplace.chdir(root)
    workplace.setenv("STILLROOM_SIB200", str(write_languages(root / "languages")))
    run_command(
        "train-teacher",
        "sib200",
        model__model=write_encoder(root / "encoder"),
        data__labelled__count=64,  # more than in the recipe: this encoder has not read anything yet
        training__learning_rate=3e-3,
    )
    run_command("cache-teacher", "sib200")
    names = ["labels", "kd", "kd-pooled", "labels-unseen", "kd-unseen"]
    run_command(
        "train-student",
        *(f"sib200-{name}" for name in names),
        student__tokenizer__buckets=8192,
        inputs__labelled__count=12,
        training__max_steps=40,
        training__learning_rate=5e-2,
        training__warmup_steps=5,
    )
    run_command("compare", "runs/sib200", "--output", "runs/sib200/report.html")
    return root


@pytest.fixture(scope="module")
def code(workplace: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the recipe demo ran, over a made-up library."""
    root = tmp_path_factory.mktemp("demo")
    workplace.chdir(root)
    paths = {**sysconfig.get_paths(), "stdlib": str(write_library(root / "library"))}
    workplace.setattr(sysconfig, "get_paths", lambda: paths)
    run_command(
        "train-teacher",
        "demo",
        task__block_size=64,
        model__layers=2,
        model__hidden_size=48,
        model__intermediate_size=64,
        tokenizer__vocab_size=300,
        training__max_steps=80,
        training__warmup_steps=10,
        training__learning_rate=5e-3,
        evaluation__every=80,
    )
    few = "{train: 2, test: 4}"  # so little text that the labels of it mislead
    run_command("cache-teacher", "demo", task__block_size=64, data__max_examples=few)
    smaller: dict[str, object] = {
        "student__intermediate_size": 48,
        "training__max_steps": 80,
        "training__learning_rate": 2e-2,
        "training__warmup_steps": 5,
        "training__per_device_train_batch_size": 8,
        "evaluation__every": 40,
    }
    names = ["demo-labels", "demo-kd", "demo-kd-hidden"]
    run_command("train-student", *names, student__hidden_size=32, **smaller)
    run_command("train-student", "demo-kd-wide", student__hidden_size=40, **smaller)
    run_command("compare", "runs/demo", "--output", "runs/demo/report.html")
    return root


# The demo


CODE_STUDENTS = ("labels", "kd", "kd-hidden", "kd-wide")


def code_run(root: Path, name: str) -> Result:
    return read_result(root / "runs" / "demo" / name)


def test_students_of_the_demo_learn_from_one_cache_and_its_teacher(code: Path) -> None:
    runs = [code_run(code, name) for name in CODE_STUDENTS]
    cache = TeacherCache.open(code / "data" / "caches" / "demo")
    assert {run.identity["cache"] for run in runs} == {cache.manifest.digest}
    assert cache.manifest.targets.temperatures == (1.0, 2.0)
    teacher = read_result(code / "data" / "teachers" / "demo")
    for run in runs:
        told = {m["name"]: m["value"] for m in run.details["teacher"]["metrics"]}
        assert run.details["teacher"]["name"] == "demo"
        assert told["loss"] == pytest.approx(teacher.metric("loss"), rel=0.02)
        assert run.training["examples_seen"] == pytest.approx(80 * 8, rel=0.2)
    sizes = [run.model["parameters"] for run in runs]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]


@pytest.mark.parametrize("name", ["kd", "kd-hidden"])
def test_a_distilled_student_of_the_demo_is_nearer_to_its_teacher(code: Path, name: str) -> None:
    labels, distilled = code_run(code, "labels"), code_run(code, name)
    assert value_of(distilled, "kl_to_teacher") < 0.7 * value_of(labels, "kl_to_teacher")
    assert value_of(distilled, "agreement") > value_of(labels, "agreement") + 5


def test_the_demos_teacher_says_the_same_live_as_from_the_cache(code: Path) -> None:
    cache = TeacherCache.open(code / "data" / "caches" / "demo")
    model = AutoModelForCausalLM.from_pretrained(code / "data" / "teachers" / "demo").float()
    example = cache[int(cache.split_indices("test")[0])]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(example.input_ids).long()[None]).logits[0]
    live = logits[torch.from_numpy(example.target_positions).long()].log_softmax(1)
    cached = example.targets.at(1.0)
    kept = cached.log_probs.exp() > 0.01
    assert kept.any()
    assert torch.allclose(live.gather(1, cached.ids)[kept], cached.log_probs[kept], atol=0.1)


def test_the_demos_report_shows_curves_costs_and_every_student(code: Path) -> None:
    page = (code / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert "Teacher demo, distilled into three students" in page
    assert all(f'data-label="{name}"' in page for name in CODE_STUDENTS)
    assert "Had the teacher taught live" in page and "Over training" in page
    assert "://" not in page


def test_the_losses_of_the_papers_learn_from_the_demos_teacher(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(code)
    few: dict[str, object] = {"task__block_size": 64, "data__max_examples": "{train: 2, test: 4}"}
    for cache in ("demo-draws", "demo-dense"):
        run_command("cache-teacher", cache, **few)
    names = ["bucket", "renormalised", "rs-kd", "skew-kl", "dense"]
    run_command(
        "train-student",
        *(f"demo-{name}" for name in names),
        student__hidden_size=32,
        student__intermediate_size=48,
        training__max_steps=80,
        training__learning_rate=2e-2,
        training__warmup_steps=5,
        training__per_device_train_batch_size=8,
        evaluation__every=80,
    )
    labels = value_of(code_run(code, "labels"), "kl_to_teacher")
    for name in names:
        run = read_result(code / "runs" / "demo-losses" / name)
        assert value_of(run, "kl_to_teacher") < labels, name


def test_a_masked_teacher_is_distilled_as_distilbert_was(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(code)
    small: dict[str, object] = {"training__learning_rate": 5e-3, "training__warmup_steps": 5}
    run_command(
        "train-teacher",
        "masked",
        task__max_length=48,
        model__layers=3,
        model__hidden_size=48,
        model__intermediate_size=64,
        tokenizer__vocab_size=300,
        training__max_steps=150,
        evaluation__every=150,
        **small,
    )
    few = "{train: 4, test: 4}"
    run_command("cache-teacher", "masked", task__max_length=48, data__max_examples=few)
    short: dict[str, object] = {**small, "training__max_steps": 40, "evaluation__every": 40}
    run_command("train-student", "masked-labels", "masked-kd", student__hidden_size=32, **short)
    run_command("train-student", "masked-distilbert", **short)
    found = {
        name: value_of(read_result(code / "runs" / "masked" / name), "kl_to_teacher")
        for name in ("labels", "kd", "distilbert")
    }
    assert found["distilbert"] < found["labels"]  # it begins with layers of the teacher
    assert found["kd"] < found["labels"]


# Topics in 24 languages


def test_the_published_recipes_learn_from_one_cache_of_features(
    topics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(topics)
    run_command("cache-teacher", "sib200-features", hidden__layers="[1, 2]", hidden__qkv="[1, 2]")
    one: dict[str, object] = {"stages__0__losses__0__layers": "{1: 2}"}
    settings = {
        "english-labels": {},
        "hinton": {},
        "pkd": {},
        "minilmv2": {**one, "stages__0__losses__0__relation_heads": 8},
        "tinybert": {},
        "xtremedistil": one,
        "relations": {},
    }
    for name, changes in settings.items():
        run_command(
            "train-student",
            f"sib200-{name}",
            student__layers="[1]",
            training__num_train_epochs=4,
            evaluation__every=8,
            **changes,
        )
    runs = topics / "runs" / "sib200-english"
    teacher = read_result(runs / "hinton").details["teacher"]["metrics"]
    reached = next(m["value"] for m in teacher if m["name"] == "accuracy" and m["slice"] == "all")
    for name in ("hinton", "pkd", "minilmv2", "tinybert", "xtremedistil", "relations"):
        assert value_of(read_result(runs / name), "accuracy") > 0.6 * reached, name
    stages = {line.get("stage") for line in read_curve(runs / "tinybert")}
    assert stages == {"layers", "prediction"}
    cached = TeacherCache.open(topics / "data" / "caches" / "sib200-features")
    assert sum("~" in name for name in cached.ids("train")) == 2 * SPLITS["train"]


def topic_run(root: Path, name: str) -> Result:
    return read_result(root / "runs" / "sib200" / name)


def read_as(root: Path, name: str) -> Reading:
    """What a student of the recipe read."""
    file = root / "runs" / "sib200" / name / "config.yaml"
    return read_cache(load_config(StudentConfig, file, [f"cache={root / 'data/caches/sib200'}"]))


def test_a_distilled_student_of_languages_agrees_with_its_teacher(topics: Path) -> None:
    teacher, labels = read_result(topics / "data/teachers/sib200"), topic_run(topics, "labels")
    assert value_of(teacher, "accuracy") > 85
    for name in ("kd", "kd-pooled", "kd-unseen"):
        run = topic_run(topics, name)
        assert value_of(run, "agreement") > 90
        assert value_of(run, "agreement") > value_of(labels, "agreement") + 10
        assert value_of(run, "accuracy") > value_of(labels, "accuracy") + 10


def test_languages_without_any_label_are_learned_from_the_teacher_alone(topics: Path) -> None:
    labels, distilled = topic_run(topics, "labels-unseen"), topic_run(topics, "kd-unseen")
    accuracy = [mean_of(run, "accuracy", LOW_RESOURCE) for run in (labels, distilled)]
    assert accuracy[0] < 40 and accuracy[1] > 85  # chance is 25 %: no word is shared
    assert mean_of(labels, "accuracy", LANGUAGES[:12]) > accuracy[0] + 20


def test_a_sentence_of_any_language_gets_what_the_teacher_says_of_the_english_one(
    topics: Path,
) -> None:
    folder = topics / "data" / "teachers" / "sib200"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read_languages(topics / "languages")
    english = {row["id"]: row["text"] for row in rows if row["lang"] == "eng_Latn"}
    joined = read_as(topics, "kd").select("test")
    assert len(joined) == SPLITS["test"] * len(LANGUAGES)
    spoken = set()
    for i in range(0, len(joined), 7):
        example = joined[i]
        assert isinstance(example, CachedExample)
        text = english[int(example.example_id)]
        with torch.no_grad():
            said = model(**tokenizer(text, return_tensors="pt")).logits[0]
        cached = example.targets.at(1.0)
        assert torch.allclose(said.softmax(0)[cached.ids[0]], cached.log_probs[0].exp(), atol=0.01)
        spoken.add(example.columns["language"])
    assert spoken == set(LANGUAGES)


def test_labels_are_given_to_the_same_sentences_in_the_chosen_languages(topics: Path) -> None:
    seen: dict[str, dict[str, set[str]]] = {}
    for name in ("kd", "kd-unseen"):
        rows = read_as(topics, name).own_rows
        assert rows is not None
        languages: dict[str, set[str]] = seen.setdefault(name, {})
        for row in rows:
            if row.columns["split"] == "train" and row.label_ids[0] != UNLABELLED:
                languages.setdefault(str(row.columns["language"]), set()).add(row.example_id)
    assert set(seen["kd"]) == set(LANGUAGES) and set(seen["kd-unseen"]) == set(LANGUAGES[:12])
    assert len({frozenset(ids) for found in seen.values() for ids in found.values()}) == 1


def test_the_report_has_every_language_and_the_teachers_own(topics: Path) -> None:
    page = (topics / "runs" / "sib200" / "report.html").read_text(encoding="utf-8")
    for metric in ("accuracy", "macro_f1"):
        for name in ("labels", "kd"):
            assert mean_of(topic_run(topics, name), metric, LANGUAGES) > 0
        title = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}[metric]
        [table] = re.findall(rf"<summary>{title}.*?</table>", page)
        assert set(re.findall(r'data-language="(\w+)"', table)) == set(LANGUAGES)
        assert "teacher sib200" in table
        english = table.split('data-language="eng_Latn"')[1].split("</tr>")[0]
        own = teacher_value(topic_run(topics, "kd"), metric, "language=eng_Latn")
        assert f">{own:.1f}<" in english
    assert "The cache asked teacher sib200 about eng_Latn alone." in page
    assert "://" not in page


def test_a_students_card_names_its_data_languages_and_licences(topics: Path) -> None:
    text = (topics / "runs" / "sib200" / "kd" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.datasets == ["Davlan/sib200"] and len(data.language) == len(LANGUAGES)
    assert text.count("| cc-by-sa-4.0 |") == 2  # what the teacher read, what the student read
    assert str(topics) not in text


def test_the_recipe_run_again_changes_nothing(topics: Path, workplace: pytest.MonkeyPatch) -> None:
    workplace.chdir(topics)
    manifest = topics / "data" / "caches" / "sib200" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert "stands already" in run_command("cache-teacher", "sib200")
    assert manifest.stat().st_mtime_ns == before


def value_of(result: Result, metric: str) -> float:
    value = result.metric(metric)
    assert value is not None
    return value


def mean_of(result: Result, metric: str, languages: Sequence[str]) -> float:
    """The mean over languages, every one of which must have been measured."""
    found = [result.metric(metric, f"language={language}") for language in languages]
    assert None not in found
    return fmean(value for value in found if value is not None)


def teacher_value(result: Result, metric: str, slice: str) -> float:
    told = result.details["teacher"]["metrics"]
    [value] = [m["value"] for m in told if (m["name"], m["slice"]) == (metric, slice)]
    return float(value)
