"""The model card of a run: what it is, where it learned, how good it is, how to open it."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.runs import Result


def write_card(folder: Path, result: Result) -> None:
    """Write <folder>/README.md in the form the hub reads."""
    (folder / "README.md").write_text(model_card(result), encoding="utf-8")


def model_card(result: Result) -> str:
    """The text of the card."""
    header = yaml.safe_dump({"library_name": "transformers", "tags": ["distillation", "stillroom"]})
    return "\n".join(
        [
            f"---\n{header}---\n",
            f"# {result.name}\n",
            _origin(result),
            "## Held-out metrics\n",
            _metrics(result),
            "## Use\n",
            _use(result),
        ]
    )


def _origin(result: Result) -> str:
    model, training = result.model, result.training
    lines = [
        f"A {result.kind} for {result.task}: {model['architecture']},"
        f" {model['parameters']:,} parameters, trained for {training['steps']:,} steps"
        f" ({training['tokens_seen']:,} tokens, {training['seconds']:.0f} s on"
        f" {training['device']}).",
    ]
    teacher = result.details.get("teacher")
    if teacher:
        lines.append(
            f"\nTeacher: {teacher['name']}, {teacher['parameters']:,} parameters, read from the"
            f" cache with digest `{result.identity['cache'][:16]}`."
        )
    terms = result.config.get("losses", [])
    lines += [f"- {_term(term)}" for term in terms]
    return "\n".join(lines) + "\n"


def _term(term: dict[str, Any]) -> str:
    shown = ", ".join(f"{k} {v}" for k, v in term.items() if k != "name" and v is not None)
    return f"loss `{term['name']}`: {shown}"


def _metrics(result: Result) -> str:
    rows = [
        f"| {metric.name} | {metric.value:.4g} {metric.unit} |"
        for metric in result.metrics
        if metric.slice == "all"
    ]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows]) + "\n"


def _use(result: Result) -> str:
    ours = result.model["architecture"] == "hashed-bag"
    first = "import pipeline.student  # registers hashed-bag\n" if ours else ""
    auto = result.model["auto_class"]
    return (
        f"```python\n{first}from transformers import AutoTokenizer, {auto}\n\n"
        f'model = {auto}.from_pretrained("{result.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{result.name}")\n```\n'
    )
