"""Rows become examples of one target each, and scores the figures that the field reports."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from pipeline.batches import Collator
from pipeline.config import parse_config
from pipeline.errors import ConfigError, DataError
from pipeline.examples import Example
from pipeline.outputs import run_student
from pipeline.scores import Scores
from pipeline.student import FromScratch, build_student
from pipeline.targets import UNLABELLED
from pipeline.tasks import TASKS
from pipeline.tasks.sequence_classification import SequenceClassification

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
LABELS = ["health", "sports", "travel"]


def word_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer of ten one-letter words."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_input_names=names, **options
    )


def make_examples(rows: list[dict], carry: tuple[str, ...] = (), **settings) -> list[Example]:
    task = SequenceClassification(**{"labels": LABELS, **settings})
    return list(task.examples(rows, word_tokenizer(), carry))


def make_scores(
    labels: list[int],
    predictions: list[int],
    confidence: list[float] | None = None,
    teacher: tuple[float, float] = (math.nan, math.nan),
) -> Scores:
    size = len(labels)
    label_log_probs = np.where(np.array(labels) == UNLABELLED, 0.0, -0.5)
    return Scores(
        label_ids=np.array(labels, dtype=np.int64),
        predictions=np.array(predictions, dtype=np.int64),
        confidence=np.array(confidence or [1.0] * size),
        label_log_probs=label_log_probs,
        kl_to_teacher=np.full(size, teacher[0]),
        agreement=np.full(size, teacher[1]),
        columns={},
    )


def measure(scores: Scores) -> dict[str, float]:
    task = SequenceClassification(labels=LABELS)
    return {metric.name: metric.value for metric in task.metrics(scores)}


def test_a_row_becomes_one_example_with_one_target() -> None:
    rows = [
        {"id": "7", "split": "train", "text": "a b", "label": 2, "language": "eng"},
        {"id": "8", "split": "test", "text": "c", "label": None, "language": "deu"},
    ]
    first, second = make_examples(rows, carry=("language",))
    assert (first.example_id, first.columns) == ("7", {"split": "train", "language": "eng"})
    assert first.input_ids.tolist() == [2, 4, 5, 3]
    assert first.segment_lengths.tolist() == [4]
    assert first.target_positions.tolist() == [0]
    assert first.label_ids.tolist() == [2]
    assert second.label_ids.tolist() == [UNLABELLED]


def test_rows_without_a_label_column_are_unlabelled() -> None:
    (example,) = make_examples([{"id": "1", "split": "train", "text": "a"}])
    assert example.label_ids.tolist() == [UNLABELLED]


def test_long_texts_are_cut_on_the_right_whatever_the_tokenizer_prefers() -> None:
    task = SequenceClassification(labels=LABELS, max_length=4)
    tokenizer = word_tokenizer(truncation_side="left")
    (example,) = task.examples([{"id": "1", "text": "a b c d e"}], tokenizer, ())
    assert example.input_ids.tolist() == [2, 4, 5, 3]
    assert tokenizer.truncation_side == "left"


def test_without_max_length_a_text_is_as_long_as_the_model_reads() -> None:
    task = SequenceClassification(labels=LABELS)
    row = {"id": "1", "text": "a b c d e f g h"}
    (short,) = task.examples([row], word_tokenizer(model_max_length=5), ())
    (whole,) = task.examples([row], word_tokenizer(), ())
    assert (len(short.input_ids), len(whole.input_ids)) == (5, 10)


def test_an_example_longer_than_the_model_is_named() -> None:
    task = SequenceClassification(labels=LABELS, max_length=8)
    rows = [{"id": "x", "text": "a"}, {"id": "y", "text": "a b c d e f"}]
    with pytest.raises(DataError, match="example y: is 8 tokens long, the model reads 5"):
        list(task.examples(rows, word_tokenizer(model_max_length=5), ()))


def test_a_pair_is_told_apart_by_token_types() -> None:
    rows = [
        {"id": "1", "text": "a b", "text_pair": "c d e"},
        {"id": "2", "text": "a", "text_pair": "b"},
    ]
    examples = make_examples(rows)
    assert [e.segment_lengths.tolist() for e in examples] == [[4, 4], [3, 2]]
    batch = SequenceClassification(labels=LABELS).batch(examples, pad_id=0)
    assert batch.inputs["token_type_ids"].tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0, 0],
    ]
    assert batch.target_index.tolist() == [0, 1]


def test_a_batch_is_what_the_tokenizer_itself_would_give() -> None:
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
    ).eval()
    texts, pairs = ["a b", "c d e f", "g"], ["h", "i j", "a a a"]
    rows = [
        {"id": str(i), "text": t, "text_pair": p}
        for i, (t, p) in enumerate(zip(texts, pairs, strict=True))
    ]
    task = SequenceClassification(labels=LABELS)
    for kept, second in ((("text",), None), (("text", "text_pair"), pairs)):
        plain = [{"id": row["id"], **{c: row[c] for c in kept}} for row in rows]
        batch = task.batch(list(task.examples(plain, tokenizer, ())), pad_id=0)
        own = tokenizer(texts, second, padding=True, return_tensors="pt")
        torch.testing.assert_close(model(**batch.inputs).logits, model(**own).logits)


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_a_pair_is_read_by_students_with_and_without_token_types(architecture: str) -> None:
    rows = [{"id": "1", "text": "a b", "text_pair": "c d e"}, {"id": "2", "text": "a"}]
    rows[1]["text_pair"] = "b"
    examples = make_examples(rows)
    task = SequenceClassification(labels=LABELS)
    origin = FromScratch(architecture=architecture, layers=1, hidden_size=16, heads=2, dropout=0)
    model = build_student(origin, task, 3, word_tokenizer(), 0).eval()
    batch = Collator(task, 0)(examples)
    logits = run_student(model, batch, [], task)[1].logits
    alone = run_student(model, Collator(task, 0)(examples[1:]), [], task)[1].logits
    torch.testing.assert_close(logits[1:], alone)
    assert set(task.model_inputs(model, batch["inputs"])) - {"token_type_ids"} == {
        "input_ids",
        "attention_mask",
    }


def test_a_batch_without_pairs_has_no_token_types() -> None:
    examples = make_examples([{"id": "1", "text": "a b"}, {"id": "2", "text": "c"}])
    batch = SequenceClassification(labels=LABELS).batch(examples, pad_id=0)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [4, 3]
    assert batch.feature_index.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 3}, r"example 9: label 3 is outside the label set of 3 \(health"),
        ({"text": "a", "label": [1]}, "9: has a list of labels.*use multi-label-classification"),
        ({"text": "a", "label": -1}, "label -1 is outside the label set"),
        ({"text": None}, "example 9: has None as its text, expected a text; .*columns.text"),
        ({"sentence": "a"}, "example 9: has None as its text"),
        ({"text": "a", "text_pair": 3}, "example 9: has 3 as its text_pair"),
    ],
)
def test_rows_that_do_not_fit_are_named(row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_examples([{"id": "9", **row}])


def test_a_text_without_tokens_is_named() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    task = SequenceClassification(labels=LABELS)
    with pytest.raises(DataError, match="example 9: its text gives no token"):
        list(task.examples([{"id": "9", "text": " "}], tokenizer, ()))


def test_the_class_space_is_the_label_set() -> None:
    assert SequenceClassification(labels=LABELS).num_classes(None) == 3
    with pytest.raises(ConfigError, match=r"name the classes in task\.labels"):
        SequenceClassification().num_classes(None)


def test_the_task_is_a_member_of_the_family() -> None:
    family = TASKS["sequence-classification"]
    raw = {"name": "sequence-classification", "labels": LABELS, "max_length": 64}
    assert parse_config(family, raw, "task").model_dump() == raw
    with pytest.raises(ConfigError, match="did you mean 'max_length'"):
        parse_config(family, {"max_lenght": 3}, "task")


def test_metrics_of_a_case_counted_by_hand() -> None:
    found = measure(make_scores([0, 0, 1, 1], [0, 1, 1, 1], [0.8, 0.6, 0.9, 0.9]))
    assert found["accuracy"] == pytest.approx(75.0)
    assert found["macro_f1"] == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)  # class 2 has no support
    assert found["loss"] == pytest.approx(0.5)
    assert found["ece"] == pytest.approx(100 * (0.2 + 0.6 + 0.2) / 4)
    assert set(found) == {"accuracy", "macro_f1", "loss", "ece"}


def test_metrics_are_left_out_where_they_have_no_meaning() -> None:
    unlabelled = make_scores([UNLABELLED] * 2, [0, 1], teacher=(0.25, 1.0))
    assert measure(unlabelled) == {"agreement": 100.0, "kl_to_teacher": 0.25}
    assert measure(make_scores([UNLABELLED], [0])) == {}
    assert SequenceClassification(labels=LABELS).details(unlabelled) == {}


def test_unlabelled_targets_do_not_count_in_figures_about_labels() -> None:
    mixed = make_scores([0, UNLABELLED, 1], [0, 2, 1], teacher=(0.5, 1.0))
    assert measure(mixed)["accuracy"] == 100.0
    assert measure(mixed)["loss"] == 0.5


def test_metrics_carry_unit_and_direction() -> None:
    scores = make_scores([0, 1], [0, 1], teacher=(0.1, 1.0))
    task = SequenceClassification(labels=LABELS)
    facts = {metric.name: (metric.unit, metric.direction) for metric in task.metrics(scores)}
    assert facts == {
        "accuracy": ("%", "higher"),
        "macro_f1": ("%", "higher"),
        "loss": ("nats", "lower"),
        "ece": ("%", "lower"),
        "agreement": ("%", "higher"),
        "kl_to_teacher": ("nats", "lower"),
    }


def test_the_report_and_the_confusions_of_a_case_counted_by_hand() -> None:
    details = SequenceClassification(labels=LABELS).details(
        make_scores([0, 0, 1, UNLABELLED], [0, 1, 1, 2])
    )
    assert details["classification_report"] == {
        "health": {"precision": 100.0, "recall": 50.0, "f1": pytest.approx(200 / 3), "support": 2},
        "sports": {"precision": 50.0, "recall": 100.0, "f1": pytest.approx(200 / 3), "support": 1},
        "travel": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    }
    counts = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert details["confusion_matrix"] == {"labels": LABELS, "counts": counts}
    json.dumps(details)


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30),
)
def test_report_matrix_and_metrics_agree(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = map(list, zip(*pairs, strict=True))
    scores = make_scores(labels, predictions)
    details = SequenceClassification(labels=LABELS).details(scores)
    report, matrix = details["classification_report"], details["confusion_matrix"]["counts"]
    found = measure(scores)
    assert sum(map(sum, matrix)) == len(pairs)
    diagonal = sum(matrix[i][i] for i in range(3))
    assert found["accuracy"] == pytest.approx(100 * diagonal / len(pairs))
    supported = [entry["f1"] for entry in report.values() if entry["support"]]
    assert found["macro_f1"] == pytest.approx(sum(supported) / len(supported))
    for index, name in enumerate(LABELS):
        support = sum(matrix[index])
        assert report[name]["support"] == support
        recall = 100 * matrix[index][index] / support if support else 0.0
        assert report[name]["recall"] == pytest.approx(recall)


@given(order=st.permutations(range(6)))
def test_metrics_do_not_depend_on_the_order_of_examples(order: list[int]) -> None:
    labels, predictions = [0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 1, 2]
    confidence = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    straight = measure(make_scores(labels, predictions, confidence))
    mixed = [[column[i] for i in order] for column in (labels, predictions, confidence)]
    assert measure(make_scores(*mixed)) == pytest.approx(straight)
