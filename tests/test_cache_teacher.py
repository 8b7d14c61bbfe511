"""Stage one from end to end, on tiny teachers: what is cached, what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_teachers import (
    TOPICS,
    make_bert,
    make_config,
    make_llama,
    make_rows,
    make_tokenizer,
    read_files,
    save_teacher,
    write_rows,
)

from pipeline.cache import TeacherCache
from pipeline.cache.manifest import Totals
from pipeline.capture_log import CaptureLog
from pipeline.errors import (
    ConfigError,
    DataError,
    MismatchError,
    ModelError,
)
from stages.cache_teacher import CacheConfig, cache_teacher

COUNT = 20


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), make_llama())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(COUNT))


def run(config: CacheConfig) -> TeacherCache:
    return TeacherCache.open(cache_teacher(config, progress=False))


def own_loss(ids: np.ndarray, positions: np.ndarray, labels: np.ndarray) -> float:
    """The mean loss of the fixture's teacher on one document, by the model's own forward."""
    with torch.no_grad():
        logits = make_llama()(input_ids=torch.from_numpy(ids).long()[None]).logits[0, :, :300]
    log_probs = torch.log_softmax(logits, dim=-1)
    return -float(log_probs[torch.from_numpy(positions).long(), torch.from_numpy(labels)].mean())


def test_the_loss_from_the_cache_is_the_teachers_own(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    task = {"name": "causal-lm", "block_size": 64, "packing": False, "overlong": "truncate"}
    cache = run(make_config(tmp_path, teacher, data, task=task))
    assert len(cache) == COUNT
    for index in (0, 5, 8):
        example = cache[index]
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad():  # transformers shifts the labels by itself
            own = float(make_llama()(input_ids=ids, labels=ids).loss)
        found = -float(example.targets.label_log_probs.mean())
        unshifted = own_loss(example.input_ids, example.target_positions, ids[0, :-1].numpy())
        assert found == pytest.approx(own, abs=2e-2)  # the model's own counts its 4 padded rows
        labels = example.label_ids.astype(np.int64)
        exact = own_loss(example.input_ids, example.target_positions, labels)
        assert found == pytest.approx(exact, abs=1e-4)
        assert abs(found - unshifted) > 1e-2


def test_with_every_class_kept_the_cache_is_the_dense_softmax(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    targets = {"top_k": "all", "temperatures": [1.0, 2.0], "codec": "lossless"}
    cache = run(make_config(tmp_path, teacher, data, targets=targets))
    example = cache[0]
    assert example.targets.ids.shape[1] == 300
    assert example.targets.ids[0].tolist() == list(range(300))
    first = int(example.segment_lengths[0])
    ids = torch.from_numpy(example.input_ids[:first]).long()[None]
    with torch.no_grad():
        logits = make_llama()(input_ids=ids).logits[0, : first - 1, :300]
    for temperature in (1.0, 2.0):
        found = example.targets.at(temperature).log_probs[: first - 1]
        expected = torch.log_softmax(logits / temperature, dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_examples_come_back_in_the_order_of_the_data_with_their_columns(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    task = {"name": "causal-lm", "block_size": 64, "packing": False, "overlong": "truncate"}
    cache = run(make_config(tmp_path, teacher, data, task=task))
    assert [cache[i].example_id for i in range(COUNT)] == [f"row {i}" for i in range(COUNT)]
    assert cache[3].columns == {"split": "train", "language": "en"}
    assert (tmp_path / "cache" / "tokenizer" / "tokenizer.json").is_file()
    assert not list((tmp_path / "cache").rglob("locks"))


def test_the_size_of_batches_changes_no_answer_but_by_rounding(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    one, other = (
        run(make_config(tmp_path / str(tokens), teacher, data, batch={"tokens": tokens}))
        for tokens in (40, 4000)
    )
    for index in range(len(one)):
        torch.testing.assert_close(
            one[index].targets.logsumexp, other[index].targets.logsumexp, rtol=1e-5, atol=1e-4
        )


def test_the_same_config_gives_the_same_bytes(tmp_path: Path, teacher: Path, data: Path) -> None:
    hidden = {"layers": [0, -1], "pooled": True}
    files = []
    for name in ("one", "two"):
        cache_teacher(make_config(tmp_path / name, teacher, data, hidden=hidden), progress=False)
        files.append(read_files(tmp_path / name / "cache"))
    assert files[0] == files[1]
    assert len(files[0]) > 10


def test_another_seed_gives_other_draws_and_the_same_head(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    one, other = (
        run(make_config(tmp_path / str(seed), teacher, data, seed=seed))[0].targets
        for seed in (0, 1)
    )
    assert torch.equal(one.ids.sort(dim=1).values, other.ids.sort(dim=1).values)
    draws = [side.draw_ids.sort(dim=1).values for side in (one, other)]
    assert not torch.equal(*draws)


def test_a_classifier_is_cached_with_its_label_names_and_pooled_vectors(
    tmp_path: Path, data: Path
) -> None:
    teacher = save_teacher(tmp_path / "bert", make_bert())
    config = make_config(
        tmp_path,
        teacher,
        data,
        task={"name": "sequence-classification", "max_length": 32},
        targets={"top_k": "all", "codec": "lossless"},
        hidden={"layers": [-1], "pooled": True, "dtype": "float32"},
    )
    cache = run(config)
    assert cache.manifest.label_names == TOPICS
    assert not cache.manifest.shifted
    example = cache[1]
    with torch.no_grad():
        own = make_bert()(
            input_ids=torch.from_numpy(example.input_ids).long()[None], output_hidden_states=True
        )
    log_probs = torch.log_softmax(own.logits[0], dim=0)
    torch.testing.assert_close(example.targets.at(1.0).log_probs[0], log_probs)
    assert float(example.targets.label_log_probs[0]) == pytest.approx(float(log_probs[1]), abs=1e-5)
    state = own.hidden_states[-1]
    torch.testing.assert_close(example.hidden["layer.2"], state[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(example.hidden["pooled"], state.mean(1), rtol=1e-4, atol=1e-5)


def test_a_finished_cache_is_kept_without_loading_the_teacher(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_llama())
    config = make_config(tmp_path, teacher, data)
    cache_teacher(config, progress=False)
    before = read_files(config.output)
    weights = teacher / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(b"?" * status.st_size)  # whoever reads this fails
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache_teacher(config)
    assert "stands already" in capsys.readouterr().out
    assert read_files(config.output) == before


def test_a_teacher_that_was_trained_on_no_longer_fits_its_finished_cache(
    tmp_path: Path, data: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_llama())
    config = make_config(tmp_path, teacher, data)
    cache_teacher(config, progress=False)
    save_teacher(teacher, make_llama())  # the same weights, written anew
    cache_teacher(config, progress=False)
    changed = make_llama()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    save_teacher(teacher, changed)
    with pytest.raises(MismatchError, match=r"cached with (data|teacher|tokenizer)\."):
        cache_teacher(config, progress=False)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"targets": {"top_k": 4, "codec": "lossless"}}, r"targets\.top_k"),
        ({"task": {"name": "causal-lm", "block_size": 16}}, r"task\.block_size"),
    ],
)
def test_changed_settings_do_not_fit_a_finished_cache(
    tmp_path: Path, teacher: Path, data: Path, changes: dict[str, Any], field: str
) -> None:
    cache_teacher(make_config(tmp_path, teacher, data), progress=False)
    with pytest.raises(MismatchError, match=f"cached with {field} "):
        cache_teacher(make_config(tmp_path, teacher, data, **changes), progress=False)


def test_how_a_capture_runs_may_change(tmp_path: Path, teacher: Path, data: Path) -> None:
    cache_teacher(make_config(tmp_path, teacher, data), progress=False)
    how = {"model": str(teacher), "device": "cpu", "attn_implementation": "eager"}
    changed = make_config(tmp_path, teacher, data, teacher=how, batch={"tokens": 64})
    cache_teacher(changed, progress=False)


def test_one_changed_word_does_not_fit_a_finished_cache(tmp_path: Path, teacher: Path) -> None:
    rows = make_rows(COUNT)
    config = make_config(tmp_path, teacher, write_rows(tmp_path / "rows.jsonl", rows))
    cache_teacher(config, progress=False)
    rows[7]["text"] += " again"
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(MismatchError, match=r"cached with (data|teacher|tokenizer)\."):
        cache_teacher(config, progress=False)


def test_a_changed_chat_template_does_not_fit_a_finished_cache(tmp_path: Path, data: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_llama())
    config = make_config(tmp_path, teacher, data)
    cache_teacher(config, progress=False)
    make_tokenizer(chat_template="{{ messages }}").save_pretrained(teacher)
    with pytest.raises(MismatchError, match=r"cached with (data|teacher|tokenizer)\."):
        cache_teacher(config, progress=False)


def test_an_example_longer_than_the_model_names_both_lengths(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    rows = make_rows(2)
    rows[1]["text"] = "many bottles " * 60
    task = {"name": "causal-lm", "block_size": 500, "packing": False}
    config = make_config(tmp_path, teacher, write_rows(tmp_path / "long.jsonl", rows), task=task)
    with pytest.raises(DataError, match=r"example 'row 1': is \d+ tokens long, .* at most 64"):
        cache_teacher(config, progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"targets": {"top_k": 301}}, ConfigError, "301 is more than the 300 classes"),
        ({"hidden": {"layers": [5]}}, ConfigError, "has no layer 5"),
        ({"teacher": {"model": "./nowhere"}}, ModelError, "nowhere: no such folder"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    tmp_path: Path,
    teacher: Path,
    data: Path,
    changes: dict[str, Any],
    error: type[Exception],
    complaint: str,
) -> None:
    with pytest.raises(error, match=complaint):
        cache_teacher(make_config(tmp_path, teacher, data, **changes), progress=False)
    assert not (tmp_path / "cache" / "draft.json").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, data: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_llama(vocab_size=290))
    with pytest.raises(ModelError, match="gives 290 logits, the tokenizer has 300 ids"):
        cache_teacher(make_config(tmp_path, teacher, data), progress=False)


def test_a_cache_of_two_sessions_is_summed_up_by_what_it_holds(tmp_path: Path) -> None:
    first = {"seconds": 2.0, "forward_seconds": 1.0, "tokens": 90, "targets": 80, "examples": 9}
    log = CaptureLog(tmp_path / "capture.json", {}, [first, first | {"tokens": 30, "examples": 3}])
    totals = Totals(examples=10, targets=89, features=0, tokens=100, bytes=5_000_000)
    told = log.summarise(tmp_path, totals)
    assert "10 examples, 100 tokens in 4.0 s (30 tokens/s, 50 % of" in told
    assert told.endswith("5.0 MB, 50000 B/token")
