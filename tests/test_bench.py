"""The bench on a tiny teacher: what it promises is there, and its arithmetic and baselines hold."""

import json
import math
from dataclasses import fields, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_teachers import make_llama, read_files, save_teacher
from torch.nn.functional import cross_entropy

from pipeline.arguments import EvaluationConfig, training_arguments
from pipeline.batches import Collator
from pipeline.cache import TargetsSpec
from pipeline.cache.codecs import Lossless, Steps
from pipeline.cache.signals.fidelity import Fidelity
from pipeline.config import load_config
from pipeline.student import FromScratch
from stages.bench import bench, parse_arguments
from stages.bench.baselines import (
    LabelledBlocks,
    LiveTrainer,
    forward_all,
    join_rows,
    join_table,
    open_parquet,
    write_parquet,
)
from stages.bench.goals import scale_rows
from stages.bench.hidden import Choice, show_choices
from stages.bench.language import LanguageRecipe
from stages.bench.losses import KEPT, make_targets, measure_peak
from stages.bench.measuring import Row, interleave, rate_row, show_rows, time_row
from stages.bench.setting import BenchConfig, Setting, prepare
from stages.bench.speed import project_jobs
from stages.bench.storage import recode
from stages.cli import find_config
from stages.train_student import StudentConfig

LANGUAGE = LanguageRecipe(classes=400, packages=(), files=40, width=8, layers=1, steps=3)
TIMES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    root = tmp_path_factory.mktemp("bench")
    return BenchConfig(
        output=root / "runs" / "bench.json",
        teacher=save_teacher(root / "teacher", make_llama(vocab_size=300)),
        files=2,
        block_size=64,
        batch_tokens=512,
        top_k=8,
        tail_draws=2,
        wide_k=16,
        student=FromScratch(
            architecture="llama", layers=1, hidden_size=16, heads=2, intermediate_size=16
        ),
        captures=1,
        epochs=1,
        reads=1,
        codec_targets=160,
        languages=(LANGUAGE,),
        models=root / "models",
        vocabularies=(128, 300),
        loss_positions=32,
        loss_width=8,
        loss_runs=1,
        vocabulary_batch=2,
        vocabulary_steps=1,
        scale_tokens=(4_000,),
    )


@pytest.fixture(scope="module")
def printed() -> StringIO:
    return StringIO()


@pytest.fixture(scope="module")
def content(config: BenchConfig, printed: StringIO) -> dict[str, Any]:
    return bench(config, Console(file=printed, width=200))


@pytest.fixture(scope="module")
def setting(config: BenchConfig, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return prepare(config, tmp_path_factory.mktemp("setting"))


def rows_of(content: dict[str, Any], start: str) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["what"].startswith(start)]


@pytest.mark.parametrize(
    ("start", "unit", "count"),
    [
        ("capture: top 8 + 2 draws", "tokens/s", 2),
        ("student step from the cache", "ms/step", 2),
        ("fused head, KL + CE", "ms", 4),
        ("step from the cache, V =", "ms/step", 2),
        ("1 student of 1,000 steps", "s", 1),
        ("5 students of 1,000 steps", "s", 1),
        ("top 8 + 2 draws: codec", "bytes/token", 3),
        ("top 16: codec", "bytes/token", 3),
        ("shards of targets", "bytes/token", 2),
        ("read targets", "tokens/s", 8),
        ("read one example at random", "µs", 2),
    ],
)
def test_every_promised_figure_stands_beside_its_baseline(
    content: dict[str, Any], start: str, unit: str, count: int
) -> None:
    found = rows_of(content, start)
    assert [row["unit"] for row in found] == [unit] * count
    assert all(row["against"] for row in found)
    for row in found:
        assert row["ratio"] == pytest.approx(row["measured"] / row["baseline"])


def test_every_number_is_finite_and_positive(content: dict[str, Any]) -> None:
    for row in content["rows"]:
        if row["goal"] == "≤ 0":
            assert row["measured"] >= 0
            continue
        numbers = [row[name] for name in ("measured", "baseline", "ratio")]
        known = [number for number in numbers if number is not None] + list(row["spread"] or ())
        assert known
        assert all(math.isfinite(number) and number > 0 for number in known), row


def test_json_file_holds_what_was_measured(content: dict[str, Any], config: BenchConfig) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = config.output.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(content))
    assert BenchConfig.model_validate(content["config"]) == config
    assert content["trained_teacher"] is True
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["torch"] == torch.__version__.partition("+")[0]


def test_scratch_files_are_removed(content: dict[str, Any], config: BenchConfig) -> None:
    left = sorted(path.name for path in config.output.parent.iterdir())
    assert left == ["bench.json", "bench.svg"]


def test_the_picture_shows_every_record_and_loads_nothing(
    content: dict[str, Any], config: BenchConfig
) -> None:
    picture = ElementTree.fromstring(config.output.with_suffix(".svg").read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    shown = [
        point
        for point in content["codecs"]
        if point["source"] == "synthetic, V = 131,072" and point["kept"] == "64"
    ]
    assert len(list(picture.iter(f"{space}circle"))) == len(shown) > 8
    texts = {text.text for text in picture.iter(f"{space}text")}
    for point in shown:
        assert point["record"] in texts or point["record"].startswith("steps")
    assert not any("href" in name for one in picture.iter() for name in one.attrib)


def test_table_prints_every_row_and_explains_every_baseline(
    content: dict[str, Any], printed: StringIO
) -> None:
    shown = " ".join(printed.getvalue().split())
    for row in content["rows"]:
        assert f"{row['what']}, {row['unit']}" in shown
        assert row["against"] in shown


def test_tables_fit_into_80_columns(content: dict[str, Any]) -> None:
    printed = StringIO()
    console = Console(file=printed, width=80)
    names = {field.name for field in fields(Row)}
    rows = [Row(**{name: row[name] for name in names}) for row in content["rows"]]
    show_rows(rows, "measured", console)
    fidelity = Fidelity(
        rows=8192,
        cosine=0.99999,
        cosine_p1=0.99999,
        relative_mse=1.5e-5,
        cka=0.99999,
        explained_variance=0.815,
    )
    show_choices([Choice("float8_e4m3fn", "random 128", 1024.0, fidelity)], console)
    assert "…" not in printed.getvalue()


def test_codecs_stand_beside_the_records_of_others(
    content: dict[str, Any], printed: StringIO
) -> None:
    points = [one for one in content["codecs"] if one["kept"] == "64"]
    assert len({one["source"] for one in points}) == 4
    for source in {one["source"] for one in points}:
        found = {one["record"]: one for one in points if one["source"] == source}
        naive, ours = found["int32 + float16"], found["steps, 99 levels"]
        assert naive["bytes"] == 6 * 64 and ours["bytes"] < found["lossless"]["bytes"]
        assert max(ours["kl"]) < 6e-4 and ours["mass"] < 1e-3
        assert set(found["lossless"]["kl"]) == set(found["lossless, float16"]["kl"]) == {0.0}
        assert found["lossless, bfloat16"]["bytes"] < found["lossless, float16"]["bytes"]
        assert found["lossless, float16"]["bytes"] < found["lossless"]["bytes"]
        assert found["steps, 277 levels"]["kl"][0] < ours["kl"][0] / 4
    assert "steps, 277 levels" in printed.getvalue()


def test_class_spaces_say_how_sure_they_are_and_what_is_trained(
    content: dict[str, Any], printed: StringIO
) -> None:
    spaces = content["spaces"]
    assert [one["name"] for one in spaces] == list(
        dict.fromkeys(point["source"] for point in content["codecs"])
    )
    assert [one["trained"] for one in spaces] == [True, True, False, False]
    teacher, trained, sharpened, synthetic = spaces
    assert sharpened["entropy"] != trained["entropy"] < math.log(400)
    assert 0 < synthetic["top_1"] < synthetic["top_64"] < 1
    assert teacher["loss"] > 0
    shown = " ".join(printed.getvalue().split())
    for one in spaces:
        assert f"{one['name']}: {one['made']}" in shown


def test_every_kind_of_target_stands_beside_its_goal(content: dict[str, Any]) -> None:
    found = [row for row in content["rows"] if " kept; synthetic" in row["what"]]
    assert [row["goal"] for row in found] == ["≤ 80 B", "≤ 100 B", "≤ 195 B", "≤ 32 B", "≤ 28 B"]
    for row in found:
        assert row["reached"] == (row["measured"] <= float(row["goal"][2:-2]))
        assert row["ratio"] < 1
    errors = rows_of(content, "codec, worst of all")
    assert len(errors) == 4 and all(row["reached"] is not None for row in errors)


def test_every_part_says_how_long_it_took(content: dict[str, Any], printed: StringIO) -> None:
    shown = printed.getvalue()
    assert sum(content["seconds"].values()) > 0
    for what, seconds in content["seconds"].items():
        assert f"measuring {what} ... {seconds:.0f} s" in shown


def test_cost_of_a_token_at_the_largest_scale_stands_beside_the_smallest() -> None:
    line = {"tokens": 100.0, "bytes/token": 36.0, "written tokens/s": 1e5, "read tokens/s": 2e6}
    more = {"tokens": 1e4, "bytes/token": 36.9, "written tokens/s": 2e5, "read tokens/s": 1e6}
    taken, written, read = scale_rows([line, {**line, "tokens": 1e3}, more])
    assert (taken.measured, taken.baseline) == (36.9, 36.0)
    assert (written.measured, written.baseline) == (5.0, 10.0)
    assert (read.measured, read.baseline) == (1.0, 0.5)
    assert [row.reached for row in (taken, written, read)] == [True, True, False]
    assert taken.what == "at 10,000 tokens a token takes"


def test_columns_add_up_to_the_bytes_per_token_with_inputs(content: dict[str, Any]) -> None:
    whole = rows_of(content, "top 8 + 2 draws: codec steps and inputs")[0]
    columns = content["columns"]["top 8 + 2 draws: steps"]
    assert sum(columns.values()) == pytest.approx(whole["measured"])
    assert whole["baseline"] == 6 * 10
    assert len(content["columns"]) == 4


def test_sides_take_turns_after_a_warm_up_that_does_not_count() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = interleave({"a": lambda: side("a"), "b": lambda: side("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert found == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}


@given(TIMES, TIMES)
def test_ratio_of_rates_is_the_inverse_ratio_of_times(
    ours: list[float], theirs: list[float]
) -> None:
    ours, theirs = ours[: len(theirs)], theirs[: len(ours)]
    rate = rate_row("", 1000, ours, "", theirs)
    times = time_row("", "ms", 1e3, ours, "", theirs)
    assert rate.ratio is not None and times.ratio is not None
    assert rate.ratio * times.ratio == pytest.approx(1.0)
    assert rate.measured * np.median(ours) == pytest.approx(1000)
    for row in (rate, times):
        assert row.spread is not None and row.repetitions == len(ours)
        assert row.spread[0] <= row.spread[1]


def test_a_row_without_baseline_has_no_ratio() -> None:
    printed = StringIO()
    row = Row("steps", "steps", 12.0)
    show_rows([row], "title", Console(file=printed))
    assert row.ratio is None
    assert "12" in printed.getvalue()


def test_jobs_are_the_capture_once_and_the_steps_of_every_student() -> None:
    one, five, steps = project_jobs(1000, 10, 100.0, [1.0, 2.0, 9.0], [4.0])
    assert (one.measured, one.baseline) == (10 + 10 * 2, 10 * 4)
    assert (five.measured, five.baseline) == (10 + 5 * 20, 5 * 40)
    assert steps.measured == 10 / (4 - 2)


def test_a_live_teacher_that_costs_nothing_never_pays_for_a_capture() -> None:
    assert len(project_jobs(1000, 10, 100.0, [2.0], [2.0])) == 2


def test_quick_takes_less_of_everything_and_json_names_the_file() -> None:
    full, quick = parse_arguments([]), parse_arguments(["--quick", "--json", "a.json"])
    assert full == BenchConfig()
    assert quick.output == Path("a.json")
    for name in ("files", "captures", "epochs", "reads"):
        assert getattr(quick, name) < getattr(full, name)


def test_the_job_is_the_demos(setting: Setting) -> None:
    demo = load_config(StudentConfig, find_config("student", "demo-kd"), ())
    config = BenchConfig()
    assert config.student == demo.student
    assert config.training_steps == demo.training["max_steps"]
    assert config.batch_size == demo.training["per_device_train_batch_size"]
    assert setting.transfer_tokens > setting.tokens
    assert replace(setting, config=BenchConfig(transfer_tokens=5)).transfer_tokens == 5


def test_recoding_gives_the_bytes_of_a_capture_with_that_codec(setting: Setting) -> None:
    targets = setting.config.targets
    setting.capture("lossless", targets.model_copy(update={"codec": Lossless()}))
    setting.capture("steps", targets.model_copy(update={"codec": Steps()}))
    recoded = recode(setting.open("lossless"), setting.folder / "recoded", Steps())
    ours, direct = (read_files(path) for path in (recoded.path, setting.folder / "steps"))
    rows = [name for name in direct if name.endswith("rows.arrow")]
    assert rows and all(ours[name] == direct[name] for name in rows)


def test_plain_baseline_learns_exactly_the_labels_of_the_targets(setting: Setting) -> None:
    examples = [one for one in setting.examples if len(one.segment_lengths) > 1]
    assert examples  # a block with two documents, whose border is no target
    rows = LabelledBlocks(examples, setting.task)
    collated = Collator(setting.task, 0)(examples)
    for number, example in enumerate(examples):
        row = {name: tensor[None] for name, tensor in rows[number].items()}
        found = setting.model(**row).loss
        logits = setting.model(**{k: v for k, v in row.items() if k != "labels"}).logits[0]
        labels = torch.from_numpy(example.label_ids.astype(np.int64))
        expected = cross_entropy(logits[example.target_positions], labels)
        assert found == pytest.approx(float(expected), rel=1e-5)
    assert len(collated["label_ids"]) == sum(
        int((rows[number]["labels"] >= 0).sum()) for number in range(len(rows))
    )


def test_live_baseline_of_a_student_that_is_the_teacher_is_its_cross_entropy(
    setting: Setting,
) -> None:
    row = {
        name: tensor[None]
        for name, tensor in LabelledBlocks(setting.examples[:1], setting.task)[0].items()
    }
    arguments = training_arguments({}, EvaluationConfig(), setting.folder / "run")
    trainer = LiveTrainer(setting.model, model=setting.model, args=arguments)
    found = trainer.compute_loss(setting.model, row)
    assert float(found) == pytest.approx(0.1 * float(setting.model(**row).loss), rel=1e-4)


def test_parquet_baseline_holds_what_the_cache_holds(setting: Setting) -> None:
    spec = TargetsSpec(top_k=8, tail_draws=2, temperatures=(1.0, 2.0), codec=Lossless())
    setting.capture("cache", spec, (-1,))
    cache = setting.open("cache")
    table = open_parquet(write_parquet(cache, setting.folder / "a.parquet"), setting.folder)
    assert len(table) == len(cache)
    theirs = join_rows([table[0], table[1]])
    ours = Collator(setting.task, 0, {"layer.2": "layer.2"})([cache[0], cache[1]])
    assert torch.equal(theirs["input_ids"], ours["inputs"]["input_ids"])
    assert torch.equal(theirs["ids"], ours["targets"].ids)
    assert torch.equal(theirs["draw_ids"], ours["targets"].draw_ids)
    assert torch.equal(theirs["logsumexp"], ours["targets"].logsumexp)
    assert torch.allclose(theirs["logits"].float(), ours["targets"].logits, rtol=1e-3)
    assert torch.equal(theirs["layer.2"].float(), ours["hidden"]["layer.2"])
    batch = join_table(table.with_format("arrow")[[0, 1]])
    assert torch.equal(batch["ids"].view_as(ours["targets"].ids), ours["targets"].ids.long())
    assert torch.equal(batch["logits"].view_as(theirs["logits"]), theirs["logits"].float())
    assert torch.equal(batch["layer.2"], ours["hidden"]["layer.2"].flatten())


def test_bare_forward_pass_is_timed(setting: Setting) -> None:
    batch = setting.task.batch(setting.examples[:2], 0)
    assert forward_all(setting.model, [batch.inputs]) > 0


def test_the_peak_of_memory_is_told_from_what_was_there_before() -> None:
    with get_context("spawn").Pool(1) as pool:  # memory that earlier tests freed is used again
        found = pool.apply(measure_peak, (partial(torch.ones, 30_000_000),))
    if found is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 115e6 <= found < 200e6


def test_made_up_targets_are_distributions() -> None:
    targets = make_targets(5, 300, torch.Generator().manual_seed(0))
    assert all(len(set(row.tolist())) == KEPT for row in targets.ids)
    assert int(targets.ids.max()) < 300
    kept = targets.at(1.0).log_probs.exp().sum(dim=1)
    torch.testing.assert_close(kept, torch.full_like(kept, math.exp(-0.1)))


def test_a_missing_teacher_is_replaced_by_one_of_the_same_shape(tmp_path: Path) -> None:
    setting = prepare(BenchConfig(teacher=tmp_path / "none"), tmp_path)
    assert not setting.trained
    shape = setting.model.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) == (4, 256, 4096)
