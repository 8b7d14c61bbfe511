"""What models write by themselves, and how near it is to the references."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_student_config, read_lines
from small_teachers import make_tokenizer
from small_translators import BOS, EOS, MAKERS, make_t5, make_translation_cache

from pipeline.errors import ConfigError
from pipeline.runs import read_result
from pipeline.tasks import Seq2Seq
from pipeline.tasks.generation import Decoding, Generation, generate_texts
from pipeline.text_metrics import UnicodeWords, describe_metrics, measure_texts
from stages.evaluate import evaluate
from stages.train_student import train_student

HYPOTHESES = ["the cat sat on the mat", "नेपाली भाषामा लेखिएको पाठ", "a third text"]
REFERENCES = [["the cat is on the mat"], ["नेपाली भाषामा लेखिएको वाक्य"], ["a text", "a third one"]]
STUDENT = {"from": "scratch", "architecture": "t5", "layers": 1, "hidden_size": 16, "heads": 2}


def test_chrf_and_bleu_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    found = measure_texts(["chrf", "bleu"], HYPOTHESES, REFERENCES)
    second: list[Any] = [None, None, "a third one"]
    columns = [[texts[0] for texts in REFERENCES], second]
    assert found["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, columns).score
    assert found["bleu"] == sacrebleu.corpus_bleu(HYPOTHESES, columns).score
    assert measure_texts(["chrf", "bleu"], ["a b c d e"], [["a b c d e"]]) == {
        "chrf": pytest.approx(100.0),
        "bleu": pytest.approx(100.0),
    }
    described = describe_metrics(["chrf", "bleu"], 2, "char")
    assert "nrefs:2" in described["chrf"] and "nc:6" in described["chrf"]
    assert "tok:char" in described["bleu"]


def test_rouge_knows_words_of_any_script_and_takes_the_best_reference() -> None:
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    english = "The still-room (1870) holds 12 bottles."
    own = scorers.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(english, "the still room")
    found = measure_texts(["rouge"], ["the still room"], [[english]])
    assert found["rouge_l"] == pytest.approx(100.0 * own["rougeL"].fmeasure)
    assert found["rouge2"] == pytest.approx(100.0 * own["rouge2"].fmeasure)
    same = measure_texts(["rouge"], HYPOTHESES[1:2], [["x", HYPOTHESES[1]]])
    assert same == {name: pytest.approx(100.0) for name in ("rouge1", "rouge2", "rouge_l")}
    assert UnicodeWords().tokenize("नेपाली भाषा।") == ["नेपाली", "भाषा"]


def test_a_missing_package_is_named_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.text_metrics.find_spec", lambda name: None)
    cache = make_translation_cache(tmp_path, make_t5())
    wanted = {"task": {"evaluate": {"metrics": ["chrf"]}}}
    with pytest.raises(ConfigError, match=r'chrf needs sacrebleu, .* "stillroom\[text\]"'):
        train_student(
            make_student_config(cache, tmp_path / "run", student=STUDENT, evaluation=wanted)
        )


def test_a_student_chooses_what_is_measured_and_nothing_else(tmp_path: Path) -> None:
    task = Seq2Seq(decoder_start=BOS)
    chosen = task.measured({"evaluate": {"num_beams": 2}})
    assert chosen.evaluate is not None and chosen.evaluate.num_beams == 2
    with pytest.raises(ConfigError, match=r"evaluation.task.decoder_start: is no setting of what"):
        task.measured({"decoder_start": 3})
    with pytest.raises(ConfigError, match=r"unknown key 'evaluate.beams'"):
        task.measured({"evaluate": {"beams": 2}})


def test_a_copy_of_its_teacher_writes_what_the_teacher_writes(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    cache = make_translation_cache(tmp_path, make_t5())
    config = make_student_config(
        cache,
        tmp_path / "run",
        student={"from": "pretrained", "model": str(tmp_path / "teacher")},
        training={"learning_rate": 0.0, "max_steps": 1},
        evaluation={
            "every": 1,
            "slices": ["language"],
            "task": {"evaluate": {"max_new_tokens": 8}},
        },
    )
    result = read_result(train_student(config))
    lines = (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    model, tokenizer = make_t5(), make_tokenizer()
    written = []
    for pair in pairs:
        ids = torch.tensor([[*tokenizer(pair["en"])["input_ids"], EOS]])
        with torch.no_grad():
            own = model.generate(input_ids=ids, max_new_tokens=8, use_cache=False)
        written.append(tokenizer.decode(own[0], skip_special_tokens=True).strip())
    references = [[pair["de"]] for pair in pairs]
    expected = measure_texts(["chrf", "bleu"], written, references)
    assert result.metric("chrf") == pytest.approx(expected["chrf"])
    assert "chrF2|" not in result.details["text_metrics"]["chrf"]
    north = [i for i, pair in enumerate(pairs) if pair["language"] == "north"]
    part = measure_texts(["chrf"], [written[i] for i in north], [references[i] for i in north])
    sliced = {(m.name, m.slice): m.value for m in evaluate(tmp_path / "run")}
    assert sliced["chrf", "language=north"] == pytest.approx(part["chrf"])
    assert read_lines(tmp_path / "run")[-1]["chrf"] == pytest.approx(expected["chrf"])


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_writes_what_each_source_writes_alone(name: str) -> None:
    model, tokenizer = MAKERS[name](), make_tokenizer()
    rows = [
        {"id": str(length), "source": "one teacher speaks " * length, "target": "x"}
        for length in (1, 3, 2)
    ]
    examples = list(Seq2Seq(decoder_start=BOS).examples(rows, tokenizer, []))
    sources = [e.input_ids[: e.segment_lengths[0]] for e in examples]
    starts = [e.input_ids[e.segment_lengths[0] :][:1] for e in examples]
    decoding = Decoding(max_new_tokens=6, num_beams=2)
    together = generate_texts(model, tokenizer, starts, decoding, sources)
    for source, start, texts in zip(sources, starts, together, strict=True):
        assert generate_texts(model, tokenizer, [start], decoding, [source]) == [texts]


def test_drawn_texts_depend_on_the_seed_alone() -> None:
    model, tokenizer = make_t5(), make_tokenizer()
    [example] = Seq2Seq(decoder_start=BOS).examples(
        [{"id": "a", "source": "the room", "target": "x"}], tokenizer, []
    )
    length = int(example.segment_lengths[0])
    source, start = example.input_ids[:length], example.input_ids[length : length + 1]
    decoding = Generation(do_sample=True, max_new_tokens=6, num_return_sequences=3)
    state = torch.get_rng_state()
    first, again, other = (
        generate_texts(model, tokenizer, [start], decoding, [source], seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other
    assert len(set(first[0])) > 1
    with pytest.raises(ValueError, match="num_return_sequences 3 is more than num_beams 2"):
        Generation(num_beams=2, num_return_sequences=3)
