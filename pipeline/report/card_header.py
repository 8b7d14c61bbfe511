"""The front matter of a model card, by the hub's own words.

https://huggingface.co/docs/hub/model-cards: language, licence, data sets, base model, and the
metrics as a model-index. Only what is known and what the hub has a word for stands in it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.metrics import Metric
from pipeline.runs import Result

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModel": "sentence-similarity",
}
_METRICS = {"macro_f1": "f1", "entity_f1": "seqeval"}  # the others by their names
_LIBRARIES = {"onnx": "onnxruntime", "sentence-transformers": "sentence-transformers"}
# ISO 639, maybe with a script and a region
_LANGUAGE = re.compile(r"([a-z]{2,3})([-_][A-Z][a-z]{3})?([-_][A-Z]{2})?")


def render_header(
    result: Result, metrics: Sequence[Metric], split: str, format: str, licence: str | None
) -> str:
    """The front matter between its lines of dashes.

    Args:
        metrics: measured on `split`.
        format: transformers, int8, onnx or sentence-transformers.
        licence: of the student; None is unknown.
    """
    known: Mapping[str, Any] = result.details.get("provenance") or {}
    hubs = {part: (known.get(part) or {}).get("hub") for part in ("data", "inputs", "student")}
    sets = list(dict.fromkeys(hub for hub in (hubs["data"], hubs["inputs"]) if hub))
    found = [metric for metric in metrics if metric.slice == "all"]
    fields = {
        "library_name": _LIBRARIES.get(format, "transformers"),
        "license": licence or "unknown",
        "pipeline_tag": _PIPELINES.get(str(result.model.get("auto_class"))),
        "language": _languages(known.get("languages") or []),
        "datasets": sets,
        "base_model": hubs["student"],
        "metrics": [_METRICS.get(metric.name, metric.name) for metric in found],
        "tags": ["distillation", "stillroom", result.task],
        "model-index": _index(result, found, split, known),
    }
    text = yaml.safe_dump({k: v for k, v in fields.items() if v}, sort_keys=False)
    return f"---\n{text}---\n"


def _languages(names: Sequence[str]) -> list[str]:
    """ISO 639 codes of names such as eng_Latn, pt-BR or fr; none where one is no such name."""
    codes = [_LANGUAGE.fullmatch(name) for name in names]
    return list(dict.fromkeys(code[1] for code in codes if code)) if all(codes) else []


def _index(
    result: Result, metrics: Sequence[Metric], split: str, known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    data = known.get("inputs") or known.get("data") or {}
    name = data.get("name") or "held-out examples"
    measured = [
        {"type": _METRICS.get(m.name, m.name), "name": m.name, "value": round(m.value, 6)}
        for m in metrics
    ]
    if not measured:
        return []
    task = _PIPELINES.get(str(result.model.get("auto_class")), result.task)
    results = {
        "task": {"type": task, "name": result.task},
        "dataset": {
            "name": name,
            "type": data.get("hub") or re.sub(r"[^\w-]+", "-", name),
            "split": split,
        },
        "metrics": measured,
    }
    return [{"name": result.name, "results": [results]}]
