"""Models, tokenizers and caches of strangers are data: nothing of them is ever run."""

import ast
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_teachers import make_llama, make_tokenizer, save_teacher

from pipeline.errors import ModelError, StillroomError
from pipeline.safe_loading import open_tokenizer
from pipeline.student.loading import load_model
from pipeline.tasks.causal_lm import CausalLM
from pipeline.teacher import Teacher, TeacherConfig
from stages.cli import main

ROOT = Path(__file__).parents[1]


class Marker:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_teacher(folder, make_llama())
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Marker(tmp_path / "ran")}, file)
    return folder


def test_weights_in_a_pickle_are_refused_with_how_to_convert_them(pickled: Path) -> None:
    name = str(pickled)
    for load in (
        lambda: Teacher.load(TeacherConfig(model=name), CausalLM(), 300),
        lambda: Teacher.load(TeacherConfig(model=name, trust_remote_code=True), CausalLM(), 300),
        lambda: load_model(name, CausalLM(), 300),
    ):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*save_pretrained") as e:
            load()
        assert "\n" not in str(e.value)
    assert not (pickled.parent / "ran").exists()


def test_converting_a_pickle_as_the_message_says_gives_a_teacher(tmp_path: Path) -> None:
    folder, model = tmp_path / "model", make_llama()
    save_teacher(folder, model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    type(model).from_pretrained(folder, use_safetensors=False).save_pretrained(folder)
    assert Teacher.load(TeacherConfig(model=str(folder)), CausalLM(), 300)


def write_code(folder: Path, kind: str) -> Path:
    """Code beside a model, which its settings name; the file that it would leave behind."""
    marker = folder / "ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Evil(PretrainedConfig if CONFIG else PreTrainedTokenizerFast): pass\n".replace(
            "CONFIG", str(kind == "config.json")
        )
    )
    file = folder / kind
    raw = json.loads(file.read_text(encoding="utf-8"))
    named = ["evil.Evil", "evil.Evil"] if "tokenizer" in kind else "evil.Evil"
    raw["auto_map"] = {"AutoTokenizer" if "tokenizer" in kind else "AutoConfig": named}
    raw |= {"model_type": "evil"} if kind == "config.json" else {"tokenizer_class": "Evil"}
    file.write_text(json.dumps(raw))
    return marker


@pytest.mark.parametrize("kind", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_model_is_not_run(tmp_path: Path, kind: str) -> None:
    save_teacher(tmp_path, make_llama())
    make_tokenizer().save_pretrained(tmp_path)
    marker = write_code(tmp_path, kind)
    for load in (
        lambda: open_tokenizer(tmp_path),
        lambda: load_model(str(tmp_path), CausalLM(), 300),
        lambda: Teacher.load(TeacherConfig(model=str(tmp_path)), CausalLM(), 300),
    ):
        try:
            load()
        except StillroomError as error:
            assert "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\x00" * 9])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, damage: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ModelError, match="holds no tokenizer that can be opened") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="cache/tokenizer: no such folder"):
        open_tokenizer(Path("cache/tokenizer"))


def calls_of(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in calls]


def keywords_of(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_no_module_opens_a_pickle_or_runs_what_it_reads() -> None:
    for room in ("pipeline", "stages"):
        for path in sorted((ROOT / room).rglob("*.py")):
            check_source(path)


def check_source(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    banned = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
    assert not {name.partition(".")[0] for name in imported} & banned
    for name, call in calls_of(tree):
        given = keywords_of(call)
        assert name not in {"eval", "exec", "compile", "__import__", "yaml.unsafe_load"}
        if name == "torch.load":
            assert given.get("weights_only") == "True"
        if name == "np.load":
            assert "allow_pickle" not in given
        if name == "yaml.load":
            assert [ast.unparse(argument) for argument in call.args[1:]] == ["_Loader"]
        if name.endswith(".from_pretrained") and "GenerationConfig" not in name:
            where, text = f"{path}:{call.lineno}", ast.unparse(call)
            assert "**NO_CODE" in text or "**_source(config)" in text, where
            weights = not any(part in name for part in ("AutoTokenizer", "AutoConfig"))
            safe = given.get("use_safetensors") == "True" or "**arguments" in text
            assert safe or not weights, where


def test_an_error_cannot_move_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nasty = "\x1b[2J\x07\u202egnp.exe\x00\x9b"
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "requires": [nasty]}))
    monkeypatch.setattr(sys, "argv", ["stillroom", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    line = capsys.readouterr().err
    assert line.rstrip("\n").isprintable() and "U+001B" in line
