"""One text from another: what teacher and student read, and what of it is learned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import make_student_config, read_lines
from small_teachers import make_tokenizer
from small_translators import (
    BOS,
    EOS,
    MAKERS,
    make_pairs,
    make_t5,
    make_translation_cache,
    make_translation_config,
)
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, NllbTokenizer

from pipeline.cache import TeacherCache, epoch_order
from pipeline.errors import ConfigError, DataError, StillroomError
from pipeline.evaluation import teacher_scores
from pipeline.examples import Example
from pipeline.identity import digest_tokenizer
from pipeline.runs import read_result
from pipeline.student import build_student
from pipeline.tasks import Seq2Seq
from stages.cache_teacher import cache_teacher
from stages.evaluate import evaluate
from stages.train_student import read_cache, train_student
from stages.train_teacher import TrainTeacherConfig, train_teacher

T5 = {"from": "scratch", "architecture": "t5", "layers": 1, "hidden_size": 16, "heads": 2}
SMALL = {**T5, "intermediate_size": 24}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_translation_cache(tmp_path_factory.mktemp("t5"), make_t5())


def make_examples(rows: list[dict[str, Any]], **settings: Any) -> list[Example]:
    task = Seq2Seq(**{"decoder_start": BOS, **settings})
    return list(task.examples(rows, make_tokenizer(), ["language"]))


def test_an_example_holds_the_source_then_what_the_decoder_says() -> None:
    row = {"id": "a", "split": "train", "source": "the room", "target": "many bottles"}
    [example] = make_examples([row])
    tokenizer = make_tokenizer()
    source, target = ([*tokenizer(row[c])["input_ids"], EOS] for c in ("source", "target"))
    assert example.input_ids.tolist() == [*source, BOS, *target]
    assert example.segment_lengths.tolist() == [len(source), 1 + len(target)]
    assert example.label_ids.tolist() == target
    after = example.input_ids[example.target_positions + 1]
    np.testing.assert_array_equal(after, example.label_ids)
    assert example.columns == {"split": "train", "target": "many bottles"}


def test_long_texts_are_cut_and_still_ended() -> None:
    row = {"id": "a", "source": "one two three four", "target": "five six seven eight"}
    [cut] = make_examples([row], max_source_length=4, max_target_length=3)
    assert cut.segment_lengths.tolist() == [4, 1 + 3]
    assert cut.label_ids[-1] == cut.input_ids[3] == EOS


def test_a_batch_gives_the_encoder_the_source_and_the_decoder_what_came_before() -> None:
    rows = [
        {"id": "a", "source": "the room", "target": "many bottles"},
        {"id": "b", "source": "one teacher speaks once", "target": "x"},
    ]
    first, second = make_examples(rows)
    batch = Seq2Seq(decoder_start=BOS).batch([first, second], pad_id=EOS)
    width = batch.inputs["decoder_input_ids"].shape[1]
    assert width == len(first.label_ids)
    assert batch.inputs["decoder_input_ids"][1, :3].tolist() == [BOS, second.label_ids[0], EOS]
    assert batch.inputs["decoder_attention_mask"].sum(1).tolist() == [width, len(second.label_ids)]
    lengths = [int(e.segment_lengths[0]) for e in (first, second)]
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths
    expected = [*range(width), *range(width, width + len(second.label_ids))]
    assert batch.target_index.tolist() == batch.feature_index.tolist() == expected
    last = Seq2Seq(decoder_start=BOS).batch([first, second], EOS, "last")
    assert last.feature_index.tolist() == [width - 1, expected[-1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "x"}, "example 1: has None as its target, expected a text; map the right"),
        ({"target": "x"}, "has None as its source"),
    ],
)
def test_rows_without_a_pair_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_examples([{"id": 1, **row}])


def test_a_tokenizer_without_languages_is_asked_for_none() -> None:
    with pytest.raises(ConfigError, match=r"'npi_Deva' is given, but the tokenizer .* knows no"):
        make_examples([{"id": 1, "source": "x", "target": "y"}], target_language="npi_Deva")


def make_nllb() -> NllbTokenizer:
    letters = {"▁": 4} | {letter: row for row, letter in enumerate("abcdefghijklmnop", 5)}
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | letters
    languages = ["eng_Latn", "npi_Deva", "sin_Sinh"]
    return NllbTokenizer(vocab=vocab, extra_special_tokens=languages, src_lang="eng_Latn")


def test_a_row_may_say_its_own_languages_and_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = make_nllb()
    before = digest_tokenizer(tokenizer)
    task = Seq2Seq(decoder_start=2, source_language="npi_Deva", target_language="eng_Latn")
    rows = [
        {"id": "a", "source": "abc", "target": "de"},
        {"id": "b", "source": "abc", "target": "de", "source_language": "sin_Sinh"},
    ]
    first, second = task.examples(rows, tokenizer, [])
    english, nepali, sinhala = tokenizer.convert_tokens_to_ids(["eng_Latn", "npi_Deva", "sin_Sinh"])
    said = [english, *tokenizer.convert_tokens_to_ids(["▁", "d", "e"]), 2]
    for example, language in ((first, nepali), (second, sinhala)):
        source, target = np.split(example.input_ids, [int(example.segment_lengths[0])])
        assert (source[0], source[-1]) == (language, 2)
        assert target.tolist() == [2, *said]
    assert digest_tokenizer(tokenizer) == before
    prompts, sources = task.prompts(rows, tokenizer)
    assert [prompt.tolist() for prompt in prompts] == [[2, english]] * 2
    assert sources is not None and sources[1][0] == sinhala
    unknown = task.model_copy(update={"target_language": "npi_Dewa"})
    with pytest.raises(ConfigError, match=r"not know the language 'npi_Dewa'.* 'npi_Deva'"):
        list(unknown.examples(rows, tokenizer, []))
    assert digest_tokenizer(tokenizer) == before


@pytest.mark.parametrize("name", MAKERS)
def test_the_cache_holds_the_models_own_loss_and_hidden_states(name: str, tmp_path: Path) -> None:
    model = MAKERS[name]()
    opened = TeacherCache.open(make_translation_cache(tmp_path, model))
    task = opened.manifest.task
    assert task["decoder_start"] == {"t5": BOS, "bart": EOS, "mbart": "last"}[name]
    for index in (0, 5, 17):
        example = opened[index]
        length = int(example.segment_lengths[0])
        source, target = np.split(example.input_ids.astype(np.int64), [length])
        labels = torch.from_numpy(target[1:])[None]
        with torch.no_grad():
            own = model(
                input_ids=torch.from_numpy(source)[None], labels=labels, output_hidden_states=True
            )
        said = example.targets
        torch.testing.assert_close(-said.label_log_probs.mean(), own.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            said.at(1.0).log_probs.gather(1, said.ids.long().argsort(1)),
            own.logits[0, :, :300].log_softmax(1),
            rtol=1e-4,
            atol=1e-4,
        )
        layers = len(own.decoder_hidden_states) - 1
        assert set(example.hidden) == {"layer.0", f"layer.{layers}"}
        torch.testing.assert_close(
            example.hidden[f"layer.{layers}"],
            own.decoder_hidden_states[-1][0],
            rtol=1e-4,
            atol=1e-3,
        )


def test_a_head_with_a_bias_that_is_not_learned_stands_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_translation_cache(tmp_path, MAKERS["bart"]())
    same = {"from": "pretrained", "model": str(tmp_path / "teacher"), "dropout": 0.0}
    training = {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
    run = train_student(
        make_student_config(cache, tmp_path / "run", student=same, training=training)
    )
    assert read_lines(run)[0]["term/forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert "in one piece" not in caplog.text  # what a head that is not found would say
    assert "held in memory" not in caplog.text


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_cached_training_equals_training_with_the_live_teacher(
    architecture: str, tmp_path: Path
) -> None:
    cache = make_translation_cache(tmp_path, MAKERS[architecture]())
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 3}
    config = make_student_config(
        cache,
        tmp_path / "run",
        student=SMALL | {"architecture": architecture, "dropout": 0.0},
        training={"learning_rate": 0.1, **settings},
    )
    reading = read_cache(config)
    classes = reading.cache.manifest.num_classes
    student = build_student(config.student, reading.task, classes, reading.tokenizer, config.seed)
    teacher = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "teacher").eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    train = reading.select("train")
    order = epoch_order(len(train), 64, 0, 0)
    for start in (0, 8, 16):
        examples = [train[int(row)] for row in order[start : start + 8]]
        batch = reading.task.batch(examples, 0)
        with torch.no_grad():
            said = teacher(**batch.inputs).logits.flatten(0, 1)[batch.target_index, :classes]
        mine = student(**batch.inputs).logits.flatten(0, 1)[batch.target_index, :classes]
        loss = functional.kl_div(
            mine.log_softmax(1), said.log_softmax(1), reduction="batchmean", log_target=True
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    found = AutoModelForSeq2SeqLM.from_pretrained(train_student(config)).state_dict()
    for key, expected in student.state_dict().items():
        torch.testing.assert_close(found[key], expected, rtol=0.0, atol=1e-5, msg=key)


def test_a_student_with_the_teachers_weights_has_nothing_to_learn(
    cache: Path, tmp_path: Path
) -> None:
    teacher = str(cache.parent / "teacher")
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={"from": "pretrained", "model": teacher},
        losses=[{"name": "forward_kl"}, {"name": "hidden_mse", "layers": {-1: -1}}],
        training={"learning_rate": 0.0, "max_steps": 1},
        evaluation={"slices": ["language"]},
    )
    result = read_result(train_student(config))
    assert result.metric("kl_to_teacher") == pytest.approx(0.0, abs=1e-5)
    assert result.metric("agreement") == 100.0
    reading = read_cache(config)
    said = teacher_scores(reading.select("test"))
    assert result.metric("loss") == pytest.approx(-said.label_log_probs.mean(), rel=1e-5)
    again = {(m.name, m.slice): m.value for m in evaluate(tmp_path / "run")}
    assert ("loss", "language=north") in again
    assert again["perplexity", "all"] == pytest.approx(np.exp(result.metric("loss")))


@pytest.mark.parametrize("architecture", ["t5", "m2m_100"])
def test_students_from_scratch_begin_as_the_teacher_does(
    architecture: str, cache: Path, tmp_path: Path
) -> None:
    student = SMALL | {"architecture": architecture, "decoder_layers": 2}
    run = train_student(
        make_student_config(
            cache, tmp_path / "run", student=student, training={"num_train_epochs": 1}
        )
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(run)
    assert model.config.decoder_start_token_id == BOS
    assert model.generation_config.decoder_start_token_id == BOS
    layers = [m for n, m in model.named_children()] and model.get_decoder()
    assert len(getattr(layers, "block", None) or layers.layers) == 2
    assert read_result(run).metric("loss") > 0


def test_a_pruned_teacher_keeps_chosen_layers_of_both_stacks(cache: Path, tmp_path: Path) -> None:
    teacher = str(cache.parent / "teacher")
    student = {"from": "teacher", "model": teacher, "decoder_layers": [1, 2]}
    run = train_student(make_student_config(cache, tmp_path / "a", student=student))
    pruned = AutoModelForSeq2SeqLM.from_pretrained(run)
    assert (pruned.config.num_layers, pruned.config.num_decoder_layers) == (2, 2)
    config = make_student_config(
        cache,
        tmp_path / "b",
        student={
            "from": "teacher",
            "model": teacher,
            "layers": [0, 1],
            "decoder_layers": [0, 1, 2],
        },
        training={"learning_rate": 0.0, "max_steps": 1},
    )
    assert read_result(train_student(config)).metric("kl_to_teacher") < 1e-5
    with pytest.raises(ConfigError, match=r"decoder_layers: .* has no layer 3; it has 0 to 2"):
        train_student(
            make_student_config(cache, tmp_path / "c", student=student | {"decoder_layers": [3]})
        )


def test_a_pruned_t5_keeps_the_position_bias_of_its_first_layer(cache: Path) -> None:
    reading = read_cache(
        make_student_config(
            cache,
            cache.parent / "x",
            student={
                "from": "teacher",
                "model": str(cache.parent / "teacher"),
                "layers": [1, 0],
                "decoder_layers": [2],
            },
        )
    )
    teacher = AutoModelForSeq2SeqLM.from_pretrained(cache.parent / "teacher")
    config = make_student_config(
        cache,
        cache.parent / "x",
        student={
            "from": "teacher",
            "model": str(cache.parent / "teacher"),
            "layers": [1, 0],
            "decoder_layers": [2],
        },
    )
    pruned = build_student(config.student, reading.task, 300, reading.tokenizer, 0)
    for kept, whole in ((pruned.encoder, teacher.encoder), (pruned.decoder, teacher.decoder)):
        found = [n for n, _ in kept.named_parameters() if "relative_attention_bias" in n]
        assert found == ["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        assert torch.equal(kept.get_parameter(found[0]), whole.get_parameter(found[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": {"pooled": True}}, "hidden.pooled: an encoder and a decoder give no one vec"),
        ({"data": {"columns": {"source": "en"}}}, "example .* has None as its target"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = make_translation_config(tmp_path, make_t5())
    settings = config.model_dump(mode="json")
    for section, values in changes.items():
        settings[section] = {**(settings[section] if section != "task" else {}), **values}
    with pytest.raises(StillroomError, match=message) as refused:
        cache_teacher(type(config).model_validate(settings), progress=False)
    assert "\n" not in str(refused.value)


def test_a_teacher_without_a_start_token_must_be_told(tmp_path: Path) -> None:
    config = make_translation_config(tmp_path, make_t5(decoder_start_token_id=None))
    with pytest.raises(ConfigError, match=r"task.decoder_start: .* no decoder_start_token_id; set"):
        cache_teacher(config, progress=False)
    told = config.model_copy(update={"task": Seq2Seq(decoder_start=7)})
    opened = TeacherCache.open(cache_teacher(told, progress=False))
    assert opened[0].input_ids[int(opened[0].segment_lengths[0])] == 7


def test_a_teacher_is_trained_from_pairs(tmp_path: Path) -> None:
    data = make_translation_config(tmp_path, make_t5()).data.model_dump()
    config = TrainTeacherConfig.model_validate(
        {
            "output": str(tmp_path / "new"),
            "task": {"name": "seq2seq"},
            "data": data,
            "model": SMALL,
            "tokenizer": {"vocab_size": 280},
            "training": {"max_steps": 2, "use_cpu": True},
        }
    )
    run = train_teacher(config)
    model = AutoModelForSeq2SeqLM.from_pretrained(run)
    assert model.generation_config.decoder_start_token_id == model.config.pad_token_id
    again = {"model": {"from": "pretrained", "model": str(run)}, "tokenizer": None}
    settings = config.model_dump(mode="json") | again | {"output": str(tmp_path / "more")}
    result = read_result(train_teacher(TrainTeacherConfig.model_validate(settings)))
    assert result.metric("loss") > 0
    assert len(make_pairs(3)) == 3
