"""What a student reads of a cache: its own tokens, or other texts of the same examples."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import TINY, make_data, make_language_cache, make_student_config, make_topic_cache
from small_teachers import (
    TOPICS,
    make_llama,
    make_rows,
    make_tokenizer,
    save_teacher,
    write_rows,
)

from pipeline.cache import TeacherCache
from pipeline.errors import CacheError, ConfigError, DataError, MismatchError, StillroomError
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.hidden import HiddenCosine, HiddenMSE
from pipeline.reading import Reading, open_reading
from pipeline.runs import read_result
from pipeline.sources import DataConfig
from pipeline.student import HashedNgramTokenizer
from stages.train_student import train_student

BAG = {
    "from": "scratch",
    "architecture": "hashed-bag",
    "hidden_size": 8,
    "tokenizer": {"buckets": 64},
}


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_topic_cache(tmp_path_factory.mktemp("topics"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_cache(tmp_path_factory.mktemp("language"))


def read(cache: Path, tokenizer: Any = None, inputs: DataConfig | None = None) -> Reading:
    return open_reading(TeacherCache.open(cache), tokenizer, inputs, "the-student")


def translate(folder: Path, rows: list[dict[str, Any]]) -> DataConfig:
    """Rows in two other languages, each under the id of the example it translates."""
    both = [
        {**row, "text": f"{word} {row['text'][::-1]}", "language": word}
        for row in rows
        for word in ("yor", "eus")
    ]
    test = {row["id"] for row in make_rows(30)[22:]}
    folder.mkdir(exist_ok=True)
    files = {
        "train": str(write_rows(folder / "a.jsonl", [r for r in both if r["id"] not in test])),
        "test": str(write_rows(folder / "b.jsonl", [r for r in both if r["id"] in test])),
    }
    return DataConfig.model_validate(
        {
            "source": "json",
            "files": files,
            "splits": {"train": "train", "test": "test"},
            "carry": ["language"],
            "label_names": TOPICS,
        }
    )


def test_a_student_that_names_nothing_reads_the_caches_own_tokens(language: Path) -> None:
    reading = read(language)
    assert reading.own_rows is None
    train, test = reading.select("train"), reading.select("test")
    ids = [[s[i].example_id for i in range(len(s))] for s in (train, test)]
    assert [*ids[0], *ids[1]] == list(TeacherCache.open(language).ids())
    assert {train[0].columns["split"], test[0].columns["split"]} == {"train", "test"}


def test_the_same_tokenizer_under_another_name_is_the_same(language: Path) -> None:
    assert read(language, make_tokenizer()).own_rows is None


def test_a_language_model_with_another_tokenizer_is_refused(language: Path) -> None:
    changed = make_tokenizer()
    changed.add_tokens(["bottle"])
    with pytest.raises(MismatchError, match=r"cached with tokenizer .*…\ \(300 ids\); the-student"):
        read(language, changed)
    with pytest.raises(MismatchError, match=r"\(300 ids\), they differ in special; cache the"):
        read(language, make_tokenizer(bos_token=None))  # as many ids, other marks


def test_other_texts_are_no_use_where_targets_belong_to_tokens(
    language: Path, tmp_path: Path
) -> None:
    inputs = DataConfig.model_validate(make_data(tmp_path))
    with pytest.raises(ConfigError, match="causal-lm targets belong to the cached tokens; leave"):
        read(language, None, inputs)


def test_another_tokenizer_reads_the_carried_texts(topics: Path) -> None:
    tokenizer = HashedNgramTokenizer(buckets=64)
    reading = read(topics, tokenizer)
    cache, train = TeacherCache.open(topics), reading.select("train")
    assert len(train) == 22
    for index in (0, 5, 21):
        own, said = train[index], cache[index]
        assert own.example_id == said.example_id
        ids = tokenizer(said.columns["text"])["input_ids"]
        assert own.input_ids.tolist() == ids[:48]  # the task's limit holds for both
        np.testing.assert_array_equal(own.label_ids, said.label_ids)
        assert torch.equal(own.targets.logits, said.targets.logits)
        assert own.columns["language"] == "en"


def test_without_carried_texts_another_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = make_topic_cache(tmp_path, data={**make_data(tmp_path), "carry": ["language"]})
    with pytest.raises(MismatchError, match=r"carries no text.* add text to data.carry"):
        read(bare, HashedNgramTokenizer(buckets=64))


def test_translations_learn_what_was_said_of_their_example(topics: Path, tmp_path: Path) -> None:
    rows = make_rows(30)
    rows[3] = {**rows[3], "label": None}  # a translation may lack the label
    reading = read(topics, HashedNgramTokenizer(buckets=64), translate(tmp_path, rows))
    train, cache = reading.select("train"), TeacherCache.open(topics)
    assert len(train) == 2 * 22
    for index in range(len(train)):
        own = train[index]
        said = cache.by_id(own.example_id)
        assert torch.equal(own.targets.logits, said.targets.logits)
        assert torch.equal(own.hidden["pooled"], said.hidden["pooled"])
        unlabelled = own.example_id == "row 3"
        expected = -100 if unlabelled else int(said.label_ids[0])
        assert [*own.label_ids, *own.targets.label_ids.tolist()] == [expected] * 2
    assert {train[i].columns["language"] for i in range(4)} == {"yor", "eus"}


def test_an_id_that_was_not_cached_is_named(topics: Path, tmp_path: Path) -> None:
    rows = [*make_rows(30), {**make_rows(1)[0], "id": "row 99"}]
    reading = read(topics, HashedNgramTokenizer(buckets=64), translate(tmp_path, rows))
    with pytest.raises(DataError, match=r"inputs: example 'row 99' is not in .*inputs.columns.id"):
        reading.select("train")


def test_other_labels_than_the_cached_ones_are_refused(topics: Path, tmp_path: Path) -> None:
    inputs = translate(tmp_path, make_rows(30))
    inputs = inputs.model_copy(update={"label_names": TOPICS[::-1]})
    with pytest.raises(MismatchError, match=r"labels are travel, .* was cached with science, "):
        read(topics, HashedNgramTokenizer(buckets=64), inputs)


def test_a_split_without_examples_is_refused(topics: Path, tmp_path: Path) -> None:
    reading = read(topics, HashedNgramTokenizer(buckets=64), translate(tmp_path, make_rows(30)))
    with pytest.raises(DataError, match="inputs: no example is in split 'validation'"):
        reading.select("validation")
    with pytest.raises(CacheError, match="no split 'validation'; choose from test, train"):
        read(topics).select("validation")


def test_only_pooled_vectors_cross_texts(topics: Path, tmp_path: Path) -> None:
    per_token, pooled = HiddenMSE(layers={1: -1}), HiddenCosine(pooled=True)
    own = read(topics)
    assert own.collator([per_token, pooled]).signals == {"layer.-1": "layer.2", "pooled": "pooled"}
    assert own.widths(own.collator([per_token]).signals) == {"layer.-1": 32}
    other = read(topics, HashedNgramTokenizer(buckets=64))
    assert other.collator([pooled]).signals == {"pooled": "pooled"}
    with pytest.raises(ConfigError, match=r"layer.2 is cached per token .* pooled vectors instead"):
        other.collator([per_token])


def test_what_is_not_cached_is_refused_with_what_is(topics: Path, language: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks for temperature 3, .* holds 1, 2; use one of"):
        read(topics).collator([ForwardKL(temperature=3.0)])
    with pytest.raises(ConfigError, match=r"no hidden states 'layer.1' \(it has layer.2, pooled\)"):
        read(topics).collator([HiddenMSE(layers={0: 1})])
    with pytest.raises(ConfigError, match=r"no hidden states 'pooled' \(it has layer.0, layer.2\)"):
        read(language).collator([HiddenMSE(pooled=True)])
    with pytest.raises(ConfigError, match=r"the teacher has no layer -4; it has 0 \(embed.* to 2"):
        read(topics).collator([HiddenMSE(layers={0: -4})])


def test_signals_that_no_loss_wants_stay_on_the_disk(topics: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(topics, copy)
    for file in copy.glob("shards/*/hidden.zarr/layer.2/c/0/0"):
        file.write_bytes(bytes(file.stat().st_size))
    reading = read(copy)
    batch = reading.collator([HiddenMSE(pooled=True)])([reading.select("train")[0]])
    assert batch["hidden"]["pooled"].shape == (1, 32)
    assert batch["targets"].num_classes == 3
    with pytest.raises(CacheError, match="cannot be read"):
        reading.collator([HiddenMSE(layers={1: -1})])([reading.select("train")[0]])


def test_a_bag_learns_translations_from_logits_and_pooled_vectors(
    topics: Path, tmp_path: Path
) -> None:
    inputs = translate(tmp_path / "data", make_rows(30))
    config = make_student_config(
        topics,
        tmp_path / "run",
        student=BAG,
        inputs=inputs.model_dump(),
        losses=[{"name": "forward_kl"}, {"name": "hidden_mse", "pooled": True}],
        evaluation={"slices": ["language"]},
    )
    result = read_result(train_student(config))
    assert result.metric("accuracy", "language=yor") is not None
    assert result.metric("kl_to_teacher", "language=eus") is not None
    assert result.details["confusion_matrix"]["labels"] == TOPICS
    teacher = {m["name"] for m in result.details["teacher"]["metrics"]}
    assert {"accuracy", "macro_f1", "loss"} <= teacher


def test_examples_are_sampled_by_a_column_of_the_cache_or_of_the_inputs(
    topics: Path, tmp_path: Path
) -> None:
    own = read(topics)
    train = own.select("train")
    texts = own.group(train, "text")
    for text, places in texts.items():
        assert {train[int(place)].columns["text"] for place in places} <= {text}
    assert sum(len(places) for places in texts.values()) == len(train) == 22
    inputs = translate(tmp_path / "data", make_rows(30))
    reading = read(topics, HashedNgramTokenizer(buckets=64), inputs)
    train = reading.select("train")
    groups = reading.group(train, "language")
    assert {name: len(rows) for name, rows in groups.items()} == {"eus": 22, "yor": 22}
    for name, places in groups.items():
        assert {train[int(place)].columns["language"] for place in places} == {name}
    with pytest.raises(ConfigError, match=r"'langage' is carried; add it to inputs\.carry"):
        reading.group(train, "langage")


def test_a_result_tells_the_training_rows_of_every_slice(topics: Path, tmp_path: Path) -> None:
    """A column of too many values, or one that only the inputs carry, costs no run its result."""
    rows = [{**row, "document": f"{row['id']} of many"} for row in make_rows(30)]
    inputs = translate(tmp_path / "data", rows).model_dump() | {"carry": ["language", "document"]}
    settings: dict[str, Any] = {"evaluation": {"slices": ["language"]}}
    settings["student"] = {"from": "scratch", "architecture": "bert", **TINY}
    run = train_student(make_student_config(topics, tmp_path / "cached", **settings))
    assert read_result(run).details["training_rows"] == {"language": {"en": {"rows": 22}}}
    settings |= {"student": BAG, "inputs": inputs}
    settings["evaluation"] = {"slices": ["language", "document"]}
    found = read_result(train_student(make_student_config(topics, tmp_path / "own", **settings)))
    told = found.details["training_rows"]
    assert told["language"] == {"eus": {"rows": 22}, "yor": {"rows": 22}}
    assert {counts["rows"] for counts in told["document"].values()} == {2}


def test_a_sampled_student_sees_as_much_of_each_language_as_it_was_told(
    topics: Path, tmp_path: Path
) -> None:
    """The teacher's language is neither of its own, and one of those has no label at all."""
    inputs = translate(tmp_path / "data", make_rows(30)).model_dump()
    inputs["labelled"] = {"where": {"language": ["eus"]}}
    settings: dict[str, Any] = {
        "student": BAG,
        "inputs": inputs,
        "sampling": {"by": "language", "exponent": 0.3, "cap": 16, "weights": {"yor": 3.0}},
        "losses": [{"name": "forward_kl"}, {"name": "cross_entropy"}],
        "evaluation": {"slices": ["language"]},
    }
    config = make_student_config(topics, tmp_path / "run", **settings)
    result = read_result(train_student(config))
    assert result.details["training_rows"]["language"] == {
        "eus": {"rows": 22, "draws": 8},
        "yor": {"rows": 22, "draws": 24},
    }
    assert result.training["examples_seen"] == 2 * 32
    assert result.training["steps"] == 2 * 32 / 8
    assert result.metric("accuracy", "language=yor") is not None
    settings["losses"] = [{"name": "cross_entropy"}]
    settings["sampling"] = {"by": "language", "exponent": 0.3}
    config = make_student_config(topics, tmp_path / "labels", **settings)
    labels = read_result(train_student(config)).details["training_rows"]
    assert labels["language"] == {"eus": {"rows": 22, "draws": 22}}


def test_a_transformer_of_the_same_tokens_learns_hidden_states_of_every_token(
    topics: Path, tmp_path: Path
) -> None:
    config = make_student_config(
        topics,
        tmp_path / "run",
        student={"from": "scratch", "architecture": "bert", **TINY},
        losses=[
            {"name": "cross_entropy"},
            {"name": "hidden_cosine", "layers": {-1: -1}},
            {"name": "rkd_angle", "layers": "uniform"},
            {"name": "gram", "pooled": True},
        ],
    )
    assert read_result(train_student(config)).metric("accuracy") is not None


def test_a_foreign_checkpoint_is_refused_by_the_stage(language: Path, tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match="cannot be opened as AutoModelForCausalLM"):
        train_student(
            make_student_config(
                language,
                tmp_path / "run",
                student={"from": "teacher", "model": str(tmp_path / "nowhere"), "layers": [0]},
            )
        )


def test_weights_that_are_cut_off_are_refused_by_the_stage(language: Path, tmp_path: Path) -> None:
    file = save_teacher(tmp_path / "half", make_llama()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    student = {"from": "pretrained", "model": str(tmp_path / "half")}
    with pytest.raises(StillroomError, match=r"cannot be opened as AutoModelForCausalLM \("):
        train_student(make_student_config(language, tmp_path / "run", student=student))
