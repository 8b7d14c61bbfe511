"""Students of a sentence encoder: near its vector, from the sentence and from its translations."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import TINY
from small_teachers import WORDS, make_rows, make_tokenizer, save_teacher, write_rows
from test_sentences import write_modules
from torch.nn import functional
from transformers import AutoModel, BertConfig, BertModel

from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import measure
from pipeline.examples import CachedExample
from pipeline.metrics import pearson, spearman
from pipeline.runs import read_result
from pipeline.sentences import SentenceHead
from pipeline.student import load_model
from pipeline.tasks import Observation, Scores, SentenceEmbeddings
from pipeline.tasks.retrieval import retrieve
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.evaluate import evaluate
from stages.train_student import StudentConfig, train_student

LOSS = {"name": "hidden_cosine", "pooled": True, "projection": "none"}
BAG = {"from": "scratch", "architecture": "hashed-bag", "hidden_size": 24}
MADE_UP = {word: f"w{place}{word[::-1]}" for place, word in enumerate(WORDS)}


def make_encoder(folder: Path, pooling: str = "mean", normalise: bool = True) -> BertModel:
    """A BERT of width 32 with the modules that sentence-transformers would write."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = BertModel(config).eval()
    save_teacher(folder, model)
    kinds = ("Pooling", "Normalize") if normalise else ("Pooling",)
    write_modules(folder, *kinds, pooling_mode=pooling)
    return model


def make_cache(root: Path, **changes: Any) -> Path:
    """Vectors of 60 texts, 44 of them for training."""
    rows = make_rows(60, longest=12)
    files = {
        name: str(write_rows(root / f"{name}.jsonl", part))
        for name, part in (("train", rows[:44]), ("test", rows[44:]))
    }
    data = {"source": "json", "files": files, "splits": {n: n for n in files}}
    settings: dict[str, Any] = {
        "output": root / "cache",
        "task": {"name": "sentence-embeddings", "max_length": 48},
        "data": {**data, "carry": ["text", "language"]},
        "teacher": {"model": str(root / "teacher")},
        "hidden": {"dtype": "float32"},
        "shard": {"examples": 25},
        **changes,
    }
    return cache_teacher(CacheConfig.model_validate(settings), progress=False)


def make_translations(cache: Path, root: Path) -> dict[str, Any]:
    """Each cached text and its word-by-word translation, under one id."""
    opened = TeacherCache.open(cache)
    examples = [opened[index] for index in range(len(opened))]
    files = {}
    for split in ("train", "test"):
        rows = [
            {"id": e.example_id, "text": " ".join(said[w] for w in str(e.columns["text"]).split())}
            | {"language": language}
            for e in examples
            if e.columns["split"] == split
            for language, said in (("en", {w: w for w in WORDS}), ("xx", MADE_UP))
        ]
        files[split] = str(write_rows(root / f"both-{split}.jsonl", rows))
    return {"source": "json", "files": files, "splits": {n: n for n in files}} | {
        "carry": ["language"]
    }


def make_student(cache: Path, output: Path, **changes: Any) -> StudentConfig:
    settings = {
        "cache": str(cache),
        "output": str(output),
        "student": {**BAG, "tokenizer": {"buckets": 4096}},
        "losses": [LOSS],
        "evaluation": {"slices": ["language"]},
        **changes,
        "training": {
            "learning_rate": 3e-2,
            "num_train_epochs": 20,
            "use_cpu": True,
            "per_device_train_batch_size": 16,
            **changes.get("training", {}),
        },
    }
    return StudentConfig.model_validate(settings)


@pytest.mark.parametrize(("pooling", "normalise"), [("mean", True), ("cls", False)])
def test_the_cache_holds_the_vectors_that_the_teachers_folder_describes(
    tmp_path: Path, pooling: str, normalise: bool
) -> None:
    model, tokenizer = make_encoder(tmp_path / "teacher", pooling, normalise), make_tokenizer()
    cache = TeacherCache.open(make_cache(tmp_path))
    assert (cache.manifest.task["normalise"], cache.manifest.task["width"]) == (normalise, 32)
    assert cache.manifest.num_classes == 1
    for index in (0, 17, 59):
        example = cache[index]
        ids = torch.tensor([tokenizer(example.columns["text"])["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state
        expected = states.mean(dim=1) if pooling == "mean" else states[:, 0]
        if normalise:
            expected = functional.normalize(expected, dim=1)
        torch.testing.assert_close(example.hidden["pooled"], expected, atol=1e-5, rtol=1e-5)


def test_a_config_overrides_what_the_teachers_folder_says(tmp_path: Path) -> None:
    make_encoder(tmp_path / "teacher")
    task = {"name": "sentence-embeddings", "pooling": "cls", "normalise": False}
    cache = TeacherCache.open(make_cache(tmp_path, task=task))
    assert (cache.manifest.task["pooling"], cache.manifest.task["normalise"]) == ("cls", False)
    assert abs(float(cache[0].hidden["pooled"].norm()) - 1.0) > 0.1


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cache, and two languages of its texts."""
    root = tmp_path_factory.mktemp("shelf")
    make_encoder(root / "teacher")
    cache = make_cache(root)
    return cache, make_translations(cache, root)


def test_a_bag_finds_the_sources_of_what_it_learned_in_two_languages(
    shelf: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    cache, inputs = shelf
    settings = {
        "inputs": inputs,
        "evaluation": {"split": "train", "slices": ["language"]},
        "training": {"learning_rate": 0.1, "num_train_epochs": 40},
    }
    run = train_student(make_student(cache, tmp_path / "bag", **settings))
    result = read_result(run)
    for language in ("language=en", "language=xx"):
        cosine, mse, there, back = (
            result.metric(name, language)
            for name in ("cosine", "mse", "retrieval_to_source", "retrieval_from_source")
        )
        assert cosine is not None and cosine > 0.8
        assert mse == pytest.approx((2 - 2 * cosine) / 32, rel=1e-3)  # both have length 1
        assert there is not None and there > 50  # by chance 2 %
        assert back is not None and back > 50
    assert [vars(metric) for metric in evaluate(run, device="cpu")] == [
        vars(metric) for metric in result.metrics
    ]


@pytest.mark.parametrize(
    ("student", "has_dense"),
    [
        ({"architecture": "bert", **TINY}, True),
        ({"architecture": "distilbert", "layers": 1, "hidden_size": 32, "heads": 2}, False),
        ({"architecture": "hashed-bag", "hidden_size": 8, "tokenizer": {"buckets": 64}}, True),
    ],
)
def test_a_finished_folder_gives_the_vectors_that_were_measured(
    shelf: tuple[Path, dict[str, Any]], tmp_path: Path, student: dict[str, Any], has_dense: bool
) -> None:
    """The transformer and the modules beside it are all that is needed."""
    cache = shelf[0]
    config = make_student(cache, tmp_path / "run", student={"from": "scratch", **student})
    run = train_student(config)
    assert (run / "2_Dense" / "model.safetensors").is_file() == has_dense
    model, head = AutoModel.from_pretrained(run).eval(), SentenceHead.read(str(run))
    assert head.normalise and head.pooling == "mean"
    task = SentenceEmbeddings.model_validate(TeacherCache.open(cache).manifest.task)
    whole = load_model(str(run), task, 1).eval()
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors = head(torch.stack([states[0].mean(dim=0), states[1, :2].mean(dim=0)]))
        outputs = whole(input_ids=ids, attention_mask=mask)
        pooled = task.pool(whole, outputs.last_hidden_state, mask.bool())
    assert vectors.shape == (2, 32)
    torch.testing.assert_close(pooled, vectors)


@pytest.mark.skipif(not os.environ.get("STILLROOM_DATA"), reason="STILLROOM_DATA is not set")
def test_students_read_the_translations_of_tatoeba(tmp_path: Path) -> None:
    make_encoder(tmp_path / "teacher")
    splits = {"splits": {name: name for name in ("train", "test")}}
    few = {"source": "tatoeba", "name": "eng", "max_examples": 300, "carry": ["text"], **splits}
    cache = make_cache(tmp_path, data=few)
    held = TeacherCache.open(cache)
    known = [held[index].example_id for index in range(len(held))]
    inputs = {"source": "tatoeba", "name": ["eng", "deu", "fra"], **splits}
    inputs |= {"carry": ["language"], "where": {"id": known}}
    run = train_student(make_student(cache, tmp_path / "run", inputs=inputs))
    for language in ("eng", "deu"):
        found = read_result(run).metric("retrieval_to_source", f"language={language}")
        assert found is not None


def test_a_student_goes_on_from_a_checkpoint_with_its_dense_layer(
    shelf: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Trained in two sessions, it ends with the same weights."""
    bert = {"from": "scratch", "architecture": "bert", **TINY}
    steps = {"save_steps": 4, "max_steps": 8, "lr_scheduler_type": "constant"}
    whole = train_student(make_student(shelf[0], tmp_path / "whole", student=bert, training=steps))

    class StopError(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceEmbeddings, "save", stop)  # as if the machine failed there
        config = make_student(shelf[0], tmp_path / "two", student=bert, training=steps)
        with pytest.raises(StopError):
            train_student(config)
    (tmp_path / "two" / "checkpoints" / "checkpoint-8").rename(tmp_path / "gone")
    assert not (tmp_path / "two" / "result.json").exists()
    two = train_student(config)
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        assert (two / file).read_bytes() == (whole / file).read_bytes()


def test_a_student_is_a_teacher(shelf: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    bert = {"from": "scratch", "architecture": "bert", **TINY}
    run = train_student(make_student(shelf[0], tmp_path / "run", student=bert))
    again = TeacherCache.open(make_cache(tmp_path, teacher={"model": str(run)}))
    assert again.manifest.signals["pooled"].width == 32
    assert again[0].hidden["pooled"].norm() == pytest.approx(1.0, abs=1e-5)


def test_a_pruned_teacher_pools_as_the_teacher_does(tmp_path: Path) -> None:
    make_encoder(tmp_path / "teacher", "cls")
    cache = make_cache(tmp_path)
    pruned = {"from": "teacher", "model": str(tmp_path / "teacher"), "layers": [0]}
    run = train_student(make_student(cache, tmp_path / "run", student=pruned))
    head = SentenceHead.read(str(run))
    assert (head.pooling, head.dense, head.normalise) == ("cls", None, True)
    assert AutoModel.from_pretrained(run).config.num_hidden_layers == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_adapters_leave_the_dense_layer_to_learn(
    shelf: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    small = {"from": "scratch", "architecture": "bert", **TINY}
    first = train_student(make_student(shelf[0], tmp_path / "first", student=small))
    lora = {"from": "pretrained", "model": str(first), "lora": {"r": 2}}
    second = train_student(make_student(shelf[0], tmp_path / "second", student=lora))
    heads = [SentenceHead.read(str(run)).dense for run in (first, second)]
    assert heads[0] is not None and heads[1] is not None
    assert not torch.equal(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{"name": "forward_kl"}], "forward_kl compares classes, of which sentence-embeddings has"),
        ([{**LOSS, "projection": "linear"}], "learns a projection that the student would not keep"),
    ],
)
def test_losses_that_teach_no_vector_are_refused(
    shelf: tuple[Path, dict[str, Any]], tmp_path: Path, losses: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_student(make_student(shelf[0], tmp_path / "run", losses=losses))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"name": "sentence-embeddings", "width": 16}},
        {"hidden": {"projection": {"name": "random", "width": 8}}},
    ],
)
def test_vectors_are_kept_as_the_teacher_gives_them(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    make_encoder(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="its vectors are the teacher's own"):
        make_cache(tmp_path, **changes)


# Pairs with scores


def test_a_pair_is_two_examples_that_share_a_score() -> None:
    rows = [
        {"id": "a", "split": "test", "text": "still room", "text_pair": "bottles", "score": 3},
        {"id": "b", "split": "test", "text": "one", "text_pair": "once", "score": None},
    ]
    examples = list(SentenceEmbeddings().examples(rows, make_tokenizer(), ["text"]))
    assert [e.example_id for e in examples] == ["a", "a#2", "b", "b#2"]
    assert [e.columns["text"] for e in examples] == ["still room", "bottles", "one", "once"]
    assert [(e.columns["pair"], e.columns["score"]) for e in examples] == [
        ("a", 3.0),
        ("a", 3.0),
        ("b", None),
        ("b", None),
    ]
    with pytest.raises(DataError, match="example c: has 'high' as its score, expected a number"):
        list(SentenceEmbeddings().examples([{**rows[0], "id": "c", "score": "high"}], None, []))


def score(vectors: torch.Tensor, ids: list[str], **columns: list[Any]) -> Scores:
    count = len(ids)
    unknown = np.full(count, math.nan)
    own = functional.normalize(vectors, dim=1).numpy()
    return Scores(
        label_ids=np.full(count, -100),
        predictions=np.zeros(count, dtype=np.int64),
        confidence=np.ones(count),
        label_log_probs=np.zeros(count),
        kl_to_teacher=unknown,
        agreement=unknown,
        columns={name: np.array(column, dtype=object) for name, column in columns.items()},
        observed={"id": np.array(ids, dtype=object), "vector": own, "teacher": own},
    )


def test_scores_of_pairs_are_ranked_against_their_cosines() -> None:
    angles = torch.tensor([0.0, 0.1, 0.0, 0.9, 0.0, 0.5, 0.0, 0.2])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    ids = ["a", "a#2", "b", "b#2", "c", "c#2", "d", "d#2"]
    pairs = [name[0] for name in ids]
    judged = [5.0, 5.0, 1.0, 1.0, 4.0, 4.0, None, None]  # nearest: a, (d), c, b
    found = measure(SentenceEmbeddings(), score(vectors, ids, pair=pairs, score=judged))
    assert {metric.name: metric.value for metric in found}["spearman"] == pytest.approx(1.0)
    swapped = [1.0, 1.0, 5.0, 5.0, 4.0, 4.0, None, None]
    found = measure(SentenceEmbeddings(), score(vectors, ids, pair=pairs, score=swapped))
    assert {metric.name: metric.value for metric in found}["spearman"] == pytest.approx(-1.0)


def test_pairs_are_scored_from_a_data_set_to_the_metrics(tmp_path: Path) -> None:
    make_encoder(tmp_path / "teacher")
    rows = make_rows(32, longest=10)
    pairs = [
        {"sentence1": one["text"], "sentence2": other["text"], "label": float(place) / 16}
        for place, (one, other) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]
    file = write_rows(tmp_path / "sts.jsonl", pairs)
    columns = {"text": "sentence1", "text_pair": "sentence2", "score": "label"}
    splits = {"train": "train[:50%]", "test": "train[50%:]"}
    data = {"source": str(file), "columns": columns, "splits": splits, "carry": ["text"]}
    cache = make_cache(tmp_path, data=data)
    assert TeacherCache.open(cache).manifest.columns["score"] == "float64"
    run = train_student(make_student(cache, tmp_path / "run", evaluation={}))
    result = read_result(run)
    assert -1 <= float(result.metric("spearman") or 9) <= 1
    assert result.metric("retrieval_to_source") is not None
    assert [metric["name"] for metric in result.details["teacher"]["metrics"]] == ["spearman"]


# Metrics by hand


def test_retrieval_goes_both_ways_among_distinct_sources() -> None:
    sources = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ids = np.array(["a", "a", "b"], dtype=object)
    own = np.array([[2.0, 0.1], [0.1, 1.0], [0.2, 9.0]])  # the second of `a` is astray
    there, back = retrieve(own, sources, ids)
    assert there == pytest.approx(2 / 3)
    assert back == pytest.approx(1.0)
    there, back = retrieve(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), sources, ids)
    assert (there, back) == (0.0, 0.0)


def test_vectors_that_are_all_alike_find_nothing_but_by_chance() -> None:
    sources = np.random.default_rng(0).normal(size=(40, 8))
    ids = np.array([str(n) for n in range(40)], dtype=object)
    there, back = retrieve(np.ones((40, 8)), sources, ids)
    assert max(there, back) == pytest.approx(1 / 40)


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    one, other = np.array([1.0, 2.0, 2.0, 9.0]), np.array([10.0, 20.0, 30.0, 40.0])
    assert spearman(one, other) == pytest.approx(pearson(np.array([1, 2.5, 2.5, 4]), other))
    assert spearman(one, np.exp(one)) == pytest.approx(1.0)
    assert spearman(one, -one) == pytest.approx(-1.0)
    assert spearman(one, np.ones(4)) == 0.0
    assert pearson(one, 3 * one - 7) == pytest.approx(1.0)


def test_without_a_teacher_only_scores_are_measured(tmp_path: Path) -> None:
    make_encoder(tmp_path / "teacher")
    task = SentenceEmbeddings()
    model = load_model(str(tmp_path / "teacher"), task, 1).eval()
    rows = [{"id": n, "text": word, "split": "test"} for n, word in enumerate(WORDS[:4])]
    examples = list(task.examples(rows, make_tokenizer(), []))
    assert not isinstance(examples[0], CachedExample)
    batch = task.batch(examples, 0)
    outputs = model(**batch.inputs)
    seen = Observation(model, None, batch.inputs, outputs, None, examples)
    with torch.no_grad():
        found = task.observe(seen)
    assert np.isnan(found["teacher"]).all() and found["vector"].shape == (4, 32)
    assert task.logits(outputs, batch.inputs).tolist() == [[0.0]] * 4
