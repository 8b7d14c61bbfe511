"""The model card of a run: what it is, where it learned, how good it is, how to open it.

    Result (+ what an export changed) -> front matter, paragraphs, tables -> README.md

What is not known is called unknown; a folder of the machine that trained is never named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.metrics import Metric
from pipeline.report.card_header import render_header
from pipeline.report.card_use import render_use
from pipeline.report.rows import ABSENT, title_of
from pipeline.runs import Result

UNKNOWN = "unknown"


@dataclass(frozen=True)
class CardExport:
    """What an export makes of a run.

    Attributes:
        format: transformers, int8, onnx or sentence-transformers.
        repository: what people open it by.
        licence: of the student, as its maker says.
        inputs: the names of what a graph takes.
        split: what was measured; that of the run's config where None.
        before, after: metrics of the run and of the export, in one order; empty where the weights
            are the same.
        notes: one sentence each.
    """

    format: str = "transformers"
    repository: str | None = None
    licence: str | None = None
    inputs: Sequence[str] = ()
    split: str | None = None
    before: Sequence[Metric] = field(default_factory=tuple)
    after: Sequence[Metric] = field(default_factory=tuple)
    notes: Sequence[str] = ()


def write_card(folder: Path, result: Result, export: CardExport | None = None) -> None:
    """Write <folder>/README.md in the form the hub reads."""
    (folder / "README.md").write_text(model_card(result, export), encoding="utf-8")


def model_card(result: Result, export: CardExport | None = None) -> str:
    """The text of the card."""
    export = export or CardExport()
    name = export.repository or result.name
    metrics = list(export.after or result.metrics)
    measured_on = result.config.get("evaluation", {}).get("split", "test")
    split = export.split if export.split and export.after else measured_on
    sections = [
        render_header(result, metrics, split, export.format, export.licence),
        f"# {name.rpartition('/')[2]}\n",
        _summary(result),
        *_section("Data", _data(result)),
        *_section("Training", _training(result)),
        *_section("Held-out metrics", _metrics(result, metrics, split)),
        *_section("What the export changed", _changes(export)),
        *_section("Licences", _licences(result, export.licence)),
        *_section("Use", render_use(result.model, name, export.format, export.inputs)),
    ]
    return "\n".join(sections)


def _section(title: str, content: str) -> list[str]:
    return [f"## {title}\n", content] if content else []


def _summary(result: Result) -> str:
    model, teacher = result.model, result.details.get("teacher")
    text = (
        f"A {result.kind} for {result.task}: {model['architecture']},"
        f" {model['parameters']:,} parameters"
    )
    if teacher:
        hub = _provenance(result, "teacher").get("hub")
        text += f". Its teacher is {hub or teacher['name']}"
        if teacher["parameters"] is not None:
            text += f" ({teacher['architecture']}, {teacher['parameters']:,} parameters)"
        text += ", whose answers were computed once and kept"
    further = (result.details.get("provenance") or {}).get("further_teachers") or []
    if further:
        text += f". Further teachers are {', '.join(t['hub'] or t['name'] for t in further)}"
    return f"{text}. Made with Stillroom.\n"


def _data(result: Result) -> str:
    """What teacher and student read, how many examples of it, in which languages."""
    if "provenance" not in result.details:
        return ""
    read, own = _provenance(result, "data"), _provenance(result, "inputs")
    lines = [f"- the teacher read {_name_data(read)}"]
    lines += [f"- the student read {_name_data(own)}, joined by example id"] if own else []
    examples = _provenance(result, "examples")
    lines.append("- examples: " + ", ".join(f"{split} {n:,}" for split, n in examples.items()))
    languages = result.details["provenance"].get("languages") or []
    lines += [f"- languages: {', '.join(languages)}"] if languages else []
    return "\n".join(lines) + "\n"


def _name_data(data: Mapping[str, Any]) -> str:
    name, hub = data.get("name"), data.get("hub")
    if hub:
        return f"[{hub}](https://huggingface.co/datasets/{hub})"
    return str(name) if name else "a data set without a name"


def _training(result: Result) -> str:
    training, config = result.training, result.config
    targets = _provenance(result, "targets")
    lines = [f"- loss {_term(term)}" for term in result.losses]
    if targets:
        temperatures = ", ".join(f"{t:g}" for t in targets["temperatures"])
        draws = f" and {targets['tail_draws']} draws from the rest" if targets["tail_draws"] else ""
        lines.append(
            f"- of each distribution: {targets['top_k']:,} classes{draws}, exact at temperature"
            f" {temperatures}"
        )
    lines += [f"- {setting}" for setting in _settings(config.get("training", {}))]
    lines.append(
        f"- seed {config.get('seed', 0)}, {training['steps']:,} steps,"
        f" {training['tokens_seen']:,} tokens, {training['seconds']:.0f} s on {training['device']}"
    )
    return "\n".join(lines) + "\n"


def _term(term: Mapping[str, Any]) -> str:
    shown = ", ".join(_settings({k: v for k, v in term.items() if k != "name"}))
    return f"`{term['name']}`: {shown}" if shown else f"`{term['name']}`"


def _settings(values: Mapping[str, Any]) -> list[str]:
    """Those that are set, and name no folder."""
    shown = {k: v for k, v in values.items() if v is not None and "/" not in str(v)}
    return [f"{name} {value}" for name, value in shown.items()]


def _metrics(result: Result, metrics: Sequence[Metric], split: str) -> str:
    """One table for the whole with the teacher beside it, one for each column of slices."""
    told = result.details.get("teacher", {}).get("metrics", [])
    teacher = {m["name"]: m["value"] for m in told if m["slice"] == "all"}
    rows = [
        [title_of(m.name), _number(m.value), _number(teacher.get(m.name)), m.unit]
        for m in metrics
        if m.slice == "all"
    ]
    tables = [f"On the split `{split}`.\n", _table(["", "student", "teacher", "unit"], rows)]
    columns = dict.fromkeys(m.slice.partition("=")[0] for m in metrics if m.slice != "all")
    tables += [_slices(metrics, column) for column in columns]
    return "\n".join(tables)


def _slices(metrics: Sequence[Metric], column: str) -> str:
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        name, _, value = metric.slice.partition("=")
        if name == column:
            found.setdefault(value, {})[metric.name] = metric.value
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [[value, *(_number(found[value].get(name)) for name in names)] for value in found]
    return _table([column, *map(title_of, names)], rows)


def _changes(export: CardExport) -> str:
    rows = [
        [title_of(old.name), _number(old.value), _number(new.value), new.unit]
        for old, new in zip(export.before, export.after, strict=True)
        if new.slice == "all"
    ]
    table = [_table(["", "before", "after", "unit"], rows)] if rows else []
    return "\n".join([*(f"{note}.\n" for note in export.notes), *table])


def _licences(result: Result, licence: str | None) -> str:
    """One line for each thing whose licence somebody must know before using the student."""
    if "provenance" not in result.details:
        return ""
    rows = [["this student", licence or UNKNOWN]]
    for part, title in (
        ("teacher", "its teacher"),
        ("student", "the checkpoint it began from"),
        ("data", "what the teacher read"),
        ("inputs", "what the student read"),
    ):
        if result.details["provenance"].get(part):
            rows.append([title, _provenance(result, part).get("licence") or UNKNOWN])
    further = result.details["provenance"].get("further_teachers") or []
    rows += [[f"its teacher {t['name']}", t["licence"] or UNKNOWN] for t in further]
    return _table(["", "licence"], rows)


def _provenance(result: Result, part: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = result.details.get("provenance", {}).get(part) or {}
    return found


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    cells = [[cell.replace("|", "/") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"
