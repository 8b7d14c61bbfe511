"""A teacher's own texts as targets: written once, scored like references, safe when interrupted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import make_student_config
from small_teachers import (
    make_config,
    make_llama,
    read_files,
    save_teacher,
    write_rows,
)
from small_translators import (
    EOS,
    make_bart,
    make_pairs,
    make_t5,
    make_translation_config,
    make_word_tokenizer,
)
from transformers import PreTrainedModel

from pipeline import generating
from pipeline.cache import TeacherCache
from pipeline.errors import ConfigError, DataError
from pipeline.runs import read_result
from pipeline.tasks import CausalLM
from pipeline.tasks.generation import Generation, Writer
from pipeline.text_metrics import measure_texts
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.extend import extend
from stages.merge import merge
from stages.train_student import train_student

BEAMS = {"num_beams": 2, "max_new_tokens": 6, "batch_size": 4}
DRAWN = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "batch_size": 4}


def make_model() -> PreTrainedModel:
    return make_t5(vocab_size=len(make_word_tokenizer()))


def make_generated_config(root: Path, generation: dict[str, Any], **changes: Any) -> CacheConfig:
    task = {"name": "seq2seq", "targets": "generated", "generation": generation}
    return make_translation_config(root, make_model(), make_word_tokenizer(), task=task, **changes)


def open_cache(config: CacheConfig) -> TeacherCache:
    return TeacherCache.open(cache_teacher(config, progress=False))


def test_generated_targets_are_learned_and_references_stay_beside_them(tmp_path: Path) -> None:
    config = make_generated_config(tmp_path, BEAMS)
    opened = open_cache(config)
    assert not (config.output / "generated.jsonl").exists()
    tokenizer, pairs = make_word_tokenizer(), {pair["id"]: pair for pair in make_pairs(30)}
    assert len(opened) == len(pairs)
    for index in range(len(opened)):
        example = opened[index]
        pair, columns = pairs[example.example_id], example.columns
        assert columns["target"] == pair["de"]
        said = tokenizer.decode(example.label_ids, skip_special_tokens=True)
        written = columns["generated"] if columns["split"] == "train" else pair["de"]
        assert said == written
        assert (columns["generated"] is None) == (columns["split"] == "test")
    run = train_student(
        make_student_config(
            config.output,
            tmp_path / "run",
            student={"from": "pretrained", "model": str(tmp_path / "teacher")},
        )
    )
    assert read_result(run).metric("loss") > 0


def test_the_teacher_finds_its_own_beams_likelier_than_the_references(tmp_path: Path) -> None:
    own = open_cache(make_generated_config(tmp_path / "a", BEAMS))
    given = open_cache(make_translation_config(tmp_path / "b", make_model(), make_word_tokenizer()))

    def loss(cache: TeacherCache) -> float:
        rows = [int(row) for row in cache.split_indices("train")]
        return sum(-float(cache[row].targets.label_log_probs.mean()) for row in rows) / len(rows)

    assert loss(own) < 0.8 * loss(given)


def test_several_drawn_texts_of_a_source_are_examples_of_their_own(tmp_path: Path) -> None:
    opened = open_cache(make_generated_config(tmp_path, DRAWN))
    first, second = opened.by_id("pair 3#0"), opened.by_id("pair 3#1")
    source = [e.input_ids[: int(e.segment_lengths[0])].tolist() for e in (first, second)]
    assert source[0] == source[1]
    assert first.columns["target"] == second.columns["target"] == make_pairs(4)[3]["de"]
    train = [opened[int(row)].columns["generated"] for row in opened.split_indices("train")]
    assert len(train) == 2 * 22
    assert sum(a != b for a, b in zip(train[::2], train[1::2], strict=True)) > 15
    assert opened.by_id("pair 25").columns["generated"] is None


def test_new_sources_join_a_cache_of_written_targets_by_themselves(tmp_path: Path) -> None:
    caches = []
    for name, pairs in (("a", make_pairs(30)[:20]), ("b", make_pairs(30)[20:])):
        source = str(write_rows(tmp_path / f"{name}.jsonl", pairs))
        data = {"source": source, "columns": {"source": "en", "target": "de"}}
        output = str(tmp_path / name)
        config = make_generated_config(tmp_path, BEAMS, data=data, output=output)
        caches.append(cache_teacher(config, progress=False))
    both = merge(caches, tmp_path / "both")
    assert list(both.ids()) == [f"pair {number}" for number in range(30)]
    assert all(both[row].columns["generated"] for row in range(30))
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"?" * 100)  # not even loaded
    with pytest.raises(ConfigError, match=r"the new rows by themselves .*`stillroom merge`"):
        extend(caches[0], make_generated_config(tmp_path, BEAMS), tmp_path / "c", progress=False)


class StoppedError(Exception):
    """The machine went away."""


def test_an_interrupted_generation_goes_on_and_leaves_the_same_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "_WINDOW", 8)
    whole = make_generated_config(tmp_path / "whole", DRAWN)
    cache_teacher(whole, progress=False)
    config = make_generated_config(tmp_path / "cut", DRAWN)
    write, asked = Writer.write, []

    def write_some(self: Writer, model: Any, tokenizer: Any, rows: Any, *how: Any) -> Any:
        if len(asked) == 3:
            raise StoppedError
        asked.append(len(rows))
        return write(self, model, tokenizer, rows, *how)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", write_some)
        with pytest.raises(StoppedError):
            cache_teacher(config, progress=False)
    file = config.output / "generated.jsonl"
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"id": "pair 8", "te')  # cut off in the middle of a line
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1 + 8 + 1

    def write_rest(self: Writer, model: Any, tokenizer: Any, rows: Any, *how: Any) -> Any:
        asked.append(len(rows))
        return write(self, model, tokenizer, rows, *how)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", write_rest)
        cache_teacher(config, progress=False)
    assert sum(asked) == 3 * 4 + (22 - 8)  # nothing of the first window was asked twice
    found, expected = (read_files(c.output) for c in (config, whole))
    assert found.keys() == expected.keys()
    rows = [name for name in found if name.endswith("rows.arrow")]
    assert rows and all(found[name] == expected[name] for name in rows)


def test_texts_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    config = make_generated_config(tmp_path, BEAMS)
    config.output.mkdir()
    stale = [{"key": "other"}, *({"id": f"pair {i}", "texts": ["stale"]} for i in range(256))]
    lines = "".join(json.dumps(line) + "\n" for line in stale)
    (config.output / "generated.jsonl").write_text(lines, encoding="utf-8")
    opened = open_cache(config)
    assert "stale" not in {opened[row].columns["generated"] for row in range(len(opened))}


def test_a_source_without_a_reference_is_enough(tmp_path: Path) -> None:
    config = make_generated_config(tmp_path, BEAMS)
    pairs = [
        {**pair, "de": None if number % 2 else pair["de"]}
        for number, pair in enumerate(make_pairs(22))
    ]
    write_rows(tmp_path / "train.jsonl", pairs)
    opened = open_cache(config)
    assert opened.by_id("pair 1").columns["target"] is None
    assert len(opened.by_id("pair 1").label_ids) > 0


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = make_generated_config(tmp_path, {**BEAMS, "splits": ["validation"]})
    with pytest.raises(DataError, match=r"task.generation.splits: no row is in validation; see"):
        cache_teacher(config, progress=False)
    with pytest.raises(ConfigError, match="num_return_sequences 2 is more than num_beams 1"):
        make_generated_config(tmp_path, {"num_return_sequences": 2})


CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("kind", ["prompts", "chats"])
def test_a_language_model_completes_prompts_and_answers_chats(kind: str, tmp_path: Path) -> None:
    tokenizer = make_word_tokenizer(chat_template=CHAT)
    model = make_llama(vocab_size=len(tokenizer), eos_token_id=EOS)
    save_teacher(tmp_path / "teacher", model, tokenizer)
    texts = ["one two", "three", "four five six"]
    rows: list[dict[str, Any]] = [
        {"id": text, "prompt": text, "completion": "ten"}
        if kind == "prompts"
        else {"id": text, "messages": [{"role": "user", "content": text}]}
        for text in texts
    ]
    config = make_config(tmp_path, tmp_path / "teacher", write_rows(tmp_path / "r.jsonl", rows))
    task = CausalLM(
        packing=False, targets="generated", generation=Generation(max_new_tokens=5, batch_size=2)
    )
    data = config.data.model_copy(update={"carry": []})
    opened = open_cache(config.model_copy(update={"task": task, "data": data}))
    for text in texts:
        example = opened.by_id(text)
        first = int(example.target_positions[0]) + 1
        prompt = torch.from_numpy(example.input_ids[:first].astype(np.int64))
        asked = {"prompts": f"<s> {text}", "chats": f"user {text} </s> assistant"}[kind]
        assert tokenizer.decode(prompt) == asked
        own = model.generate(input_ids=prompt[None], max_new_tokens=5, eos_token_id=EOS)
        said = tokenizer.decode(own[0, first:], skip_special_tokens=True)
        assert said
        assert tokenizer.decode(example.label_ids, skip_special_tokens=True) == said


def test_a_bart_writes_from_its_start_token(tmp_path: Path) -> None:
    task = {"name": "seq2seq", "targets": "generated", "generation": BEAMS}
    model, tokenizer = make_bart(vocab_size=24), make_word_tokenizer()
    opened = open_cache(make_translation_config(tmp_path, model, tokenizer, task=task))
    example = opened.by_id("pair 0")
    assert example.label_ids[-1] == 1
    assert example.columns["generated"]


def test_the_teachers_own_texts_are_measured_beside_its_students(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    task = {
        "name": "seq2seq",
        "targets": "generated",
        "generation": {**BEAMS, "splits": ["train"]},
        "evaluate": {"max_new_tokens": 8},
    }
    config = make_translation_config(tmp_path, make_model(), make_word_tokenizer(), task=task)
    opened = open_cache(config)
    pairs = {pair["id"]: pair["de"] for pair in make_pairs(30)}
    written, references = [], []
    for row in opened.split_indices("test"):
        columns = opened[int(row)].columns
        assert columns["generated"] is None
        written.append(str(columns["hypothesis"]))
        references.append([pairs[opened[int(row)].example_id]])
    expected = measure_texts(["chrf", "bleu"], written, references)
    same = {"from": "pretrained", "model": str(tmp_path / "teacher")}
    run = train_student(
        make_student_config(
            config.output,
            tmp_path / "run",
            student=same,
            training={"learning_rate": 0.0, "max_steps": 1},
            evaluation={"slices": ["language"]},
        )
    )
    result = read_result(run)
    teacher = {(m["name"], m["slice"]): m["value"] for m in result.details["teacher"]["metrics"]}
    assert teacher["chrf", "all"] == pytest.approx(expected["chrf"])
    assert teacher["bleu", "all"] == pytest.approx(expected["bleu"])
    assert result.metric("chrf") == pytest.approx(expected["chrf"])
    assert ("chrf", "language=south") in teacher
