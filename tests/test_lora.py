"""Students that learn by adapters: little is trained, the finished folder is an ordinary model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import make_language_cache, make_student_config, make_topic_cache, open_student
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.errors import ConfigError
from pipeline.runs import read_result
from stages import progress
from stages.train_student import train_student

NEEDED = 'needs pip install "stillroom[lora]"'
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "dropout": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_cache(tmp_path_factory.mktemp("cache"))


def configure(cache: Path, output: Path, lora: dict[str, Any], **changes: Any) -> Any:
    student = {"from": "teacher", "model": str(cache.parent / "teacher"), "layers": [0], **lora}
    losses = [{"name": "cross_entropy"}, {"name": "hidden_mse", "layers": {1: -1}}]
    return make_student_config(cache, output, student=student, losses=losses, **changes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_only_adapted_layers_change_and_the_folder_is_an_ordinary_model(
    cache: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason=NEEDED)
    lora = {"lora": {**LORA, "keep_adapter": True}}
    run = train_student(configure(cache, tmp_path / "run", lora))
    began = train_student(
        configure(cache, tmp_path / "began", {}, training={"learning_rate": 0.0, "max_steps": 1})
    )
    before, after = (open_student(folder).state_dict() for folder in (began, run))
    assert before.keys() == after.keys()
    for name, value in before.items():
        adapted = "q_proj" in name or "v_proj" in name
        assert torch.equal(value, after[name]) != adapted, name
    for name in (n for n in before if "q_proj" in n):
        rank = torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)
        assert rank <= LORA["r"]
    assert read_result(run).model["parameters"] == read_result(began).model["parameters"]
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(began), run / "adapter"
    )
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(ids).logits, open_student(run).eval()(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_an_interrupted_run_and_its_stages_end_with_the_same_bits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason=NEEDED)
    settings: dict[str, Any] = {
        "stages": [{"steps": 2}, {"steps": 3, "freeze": ["*v_proj*"]}],
        "evaluation": {"every": 1},
    }
    whole = train_student(configure(cache, tmp_path / "whole", {"lora": LORA}, **settings))
    broken = configure(cache, tmp_path / "broken", {"lora": LORA}, **settings)
    logged: list[int] = []
    usual = progress.TrainingProgress.on_log

    def stop(self: Any, args: Any, state: Any, control: Any, logs: Any, **rest: Any) -> None:
        logged.append(state.global_step)
        usual(self, args, state, control, logs, **rest)
        if logged.count(2) == 3:  # twice in the first stage, training and held-out
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress.TrainingProgress, "on_log", stop)
        with pytest.raises(KeyboardInterrupt):
            train_student(broken)
    assert list((tmp_path / "broken" / "checkpoints").glob("*/*"))
    train_student(broken)
    one, other = (load_file(r / "model.safetensors") for r in (whole, tmp_path / "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_head_of_a_classifier_learns_as_a_whole(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason=NEEDED)
    cache = make_topic_cache(tmp_path)
    teacher = tmp_path / "teacher"
    run = train_student(
        make_student_config(
            cache,
            tmp_path / "run",
            student={"from": "pretrained", "model": str(teacher), "lora": {"r": 2}},
        )
    )
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (teacher, run)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {"classifier.weight", "classifier.bias"} < changed
    assert all("classifier" in n or "query" in n or "value" in n for n in changed)
    assert not (run / "adapter").exists()


def test_layers_that_are_not_there_are_refused(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason=NEEDED)
    wrong = {"lora": {"target_modules": ["q_pro"]}}
    with pytest.raises(ConfigError, match=r"student.lora.target_modules: .*q_pro") as refused:
        train_student(configure(cache, tmp_path / "run", wrong))
    assert "\n" not in str(refused.value)


def test_without_peft_one_line_says_what_to_install(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'pip install "stillroom\[lora\]"'):
        train_student(configure(cache, tmp_path / "run", {"lora": LORA}))


def test_a_new_model_has_nothing_to_adapt(tmp_path: Path) -> None:
    student = {"from": "scratch", "architecture": "llama", "lora": LORA}
    with pytest.raises(ValueError, match="lora"):
        make_student_config(tmp_path, tmp_path / "run", student=student)
