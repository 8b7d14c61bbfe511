"""A teacher is loaded, or refused in one line."""

import json
from pathlib import Path

import pytest
from small_teachers import TOPICS, make_bert, make_llama, make_tokenizer, save_teacher
from transformers import BertModel

from pipeline.errors import ModelError
from pipeline.tasks.causal_lm import CausalLM
from pipeline.tasks.sequence_classification import SequenceClassification
from pipeline.teacher import (
    Teacher,
    TeacherConfig,
    load_tokenizer,
)

V = 300


def test_identity_follows_weights_and_config_but_not_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_teacher(tmp_path / name, make_llama())
    one, two = (
        Teacher.load(TeacherConfig(model=str(tmp_path / name)), CausalLM(), V).identity()
        for name in ("one", "two")
    )
    assert one == two
    assert Teacher(make_llama(rms_norm_eps=1e-3), CausalLM(), V).identity() != one


def test_code_that_comes_with_a_model_is_part_of_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    found = []
    for name, body in (("one", "pass"), ("two", "answer = 42"), ("copy_of_one", "pass")):
        folder = save_teacher(tmp_path / name, make_llama())
        code = (
            f"from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    {body}\n"
        )
        (folder / "modeling_own.py").write_text(code, encoding="utf-8")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        config = TeacherConfig(model=str(folder), trust_remote_code=True)
        found.append(Teacher.load(config, CausalLM(), V).identity())
    assert found[0]["digest"] == found[1]["digest"]
    assert found[0]["code"] != found[1]["code"]
    assert found[0] == found[2]
    assert "code" not in Teacher(make_llama(), CausalLM(), V).identity()


def load(folder: Path | str, labels: list[str] | None = None) -> Teacher:
    config = TeacherConfig(model=str(folder))
    if labels is None:
        return Teacher.load(config, CausalLM(), V)
    return Teacher.load(config, SequenceClassification(labels=labels), len(labels))


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent: no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(ModelError, match="absent: no such folder"):
        load_tokenizer(TeacherConfig(model=str(tmp_path / "absent")))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(TeacherConfig(model=str(tmp_path)))


def test_a_model_whose_head_was_never_trained_is_refused(tmp_path: Path) -> None:
    BertModel(make_bert().config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights for classifier\.bias \(2 missing\)"):
        load(tmp_path, TOPICS)


@pytest.mark.parametrize("kept", [100, -100])
def test_weights_that_are_cut_off_are_refused(tmp_path: Path, kept: int) -> None:
    file = save_teacher(tmp_path, make_bert()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cannot be loaded as Auto.* while deserializing header"):
        load(tmp_path)


def test_an_architecture_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = make_llama().config
    config.model_type = "not-a-model"
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be loaded as AutoModelForCausalLM"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [(["a", "b"], "has 3 labels, the data have 2"), (TOPICS[::-1], "set data.label_names")],
)
def test_labels_that_are_not_the_datas_are_refused(
    tmp_path: Path, labels: list[str], complaint: str
) -> None:
    make_bert().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=complaint):
        load(tmp_path, labels)


def test_a_tokenizer_larger_than_the_head_is_refused() -> None:
    with pytest.raises(ModelError, match="gives 304 logits, the tokenizer has 305 ids"):
        Teacher(make_llama(), CausalLM(), 305)


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    config = TeacherConfig(model=str(tmp_path), device="gpu")
    with pytest.raises(ModelError, match="'gpu' cannot be used here"):
        Teacher.load(config, CausalLM(), V)


def test_every_byte_is_a_token_of_the_fixture() -> None:
    assert len(make_tokenizer()) == V
