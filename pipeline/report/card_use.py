"""The lines of Python that open a student, for each form it is deployed in."""

from collections.abc import Mapping, Sequence
from typing import Any


def render_use(model: Mapping[str, Any], name: str, format: str, inputs: Sequence[str] = ()) -> str:
    """A block of code.

    Args:
        model: of a result: its `architecture` and `auto_class`.
        name: of the folder or the repository.
        format: transformers, int8, onnx or sentence-transformers.
        inputs: the names of what a graph takes.
    """
    if format == "transformers" and model.get("auto_class") == "AutoModel":
        format = "sentence-transformers"  # a sentence encoder's folder is one of both
    lines = _LINES[format](str(model.get("auto_class", "AutoModel")), name, inputs)
    if model.get("architecture") == "hashed-bag" and format != "int8":
        lines = ["import pipeline.student  # of Stillroom: registers hashed-bag", *lines]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _transformers(auto: str, name: str, inputs: Sequence[str]) -> list[str]:
    return [
        f"from transformers import {', '.join(sorted(['AutoTokenizer', auto]))}",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]


def _int8(auto: str, name: str, inputs: Sequence[str]) -> list[str]:
    return [
        "from transformers import AutoTokenizer",
        "",
        "from pipeline.export import load_int8  # of Stillroom",
        "",
        f'model = load_int8("{name}")  # called as any {auto}',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        *(_HEAD.format(name=name).splitlines() if auto == "AutoModel" else []),
    ]


def _onnx(auto: str, name: str, inputs: Sequence[str]) -> list[str]:
    lines = [
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        f'session = onnxruntime.InferenceSession("{name}/model.onnx")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        'given = tokenizer(["a text"], return_tensors="np")',
    ]
    if "position_ids" in inputs:  # pad on the right: nothing looks ahead
        lines.append('given["position_ids"] = given["attention_mask"].cumsum(1) - 1')
    names = ", ".join(f'"{wanted}"' for wanted in inputs)
    return [*lines, f"outputs = session.run(None, {{name: given[name] for name in ({names},)}})"]


def _sentence_transformers(auto: str, name: str, inputs: Sequence[str]) -> list[str]:
    return [
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{name}")',
        'vectors = model.encode(["a text", "another one"])',
    ]


_HEAD = """
from pipeline.sentences import SentenceHead  # of Stillroom

head = SentenceHead.read("{name}")  # of the pooled states: vectors"""
_LINES = {
    "transformers": _transformers,
    "int8": _int8,
    "onnx": _onnx,
    "sentence-transformers": _sentence_transformers,
}
