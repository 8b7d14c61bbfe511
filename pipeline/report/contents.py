"""Tables of what is in a cache, and of one example in it, for the terminal.

    Survey, bytes by column -> tables;  CachedExample + a way to spell token ids -> table

All text of the cache passes `show_invisible` or `show_running`: none of it acts on the terminal.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from rich.table import Table
from rich.text import Text

from pipeline.examples import CachedExample
from pipeline.report.rows import ABSENT, format_bytes
from pipeline.report.survey import PERCENTILES, Survey, percentiles
from pipeline.report.text import isolate, show_invisible, show_running
from pipeline.targets import UNLABELLED, SparseDistribution

Spell = Callable[[int], str]  # a token id -> its text


def bytes_table(column_bytes: Mapping[str, int], tokens: int) -> Table:
    """Bytes per token by column, the largest first, and their sum."""
    table = _table("column", "bytes/token", "size")
    for name, size in sorted(column_bytes.items(), key=lambda item: -item[1]):
        table.add_row(Text(show_running(name)), f"{size / max(tokens, 1):,.2f}", format_bytes(size))
    total = sum(column_bytes.values())
    table.add_section()
    table.add_row("all", f"{total / max(tokens, 1):,.2f}", format_bytes(total))
    return table


def survey_table(survey: Survey) -> Table:
    """Kept mass, the bounds of the entropy and the loss on labels, by percentile."""
    table = _table("at T = 1", *(f"{p} %" for p in PERCENTILES), "mean")
    rows = [
        ("kept mass", survey.kept_mass, 4),
        ("entropy, low", survey.entropy_low, 3),
        ("entropy, high", survey.entropy_high, 3),
    ]
    if len(survey.label_loss):
        rows.append(("label loss", survey.label_loss, 3))
    for name, values, decimals in rows:
        if len(values):
            cells = [f"{v:.{decimals}f}" for v in (*percentiles(values), float(values.mean()))]
            table.add_row(name, *cells)
    return table


def token_table(
    example: CachedExample,
    spell: Spell,
    spell_class: Spell | None = None,
    choices: int = 4,
    per_line: int = 4,
) -> Table:
    """One row per token: what was read, what came next and what the teacher expected there.

    Positions without a target (a prompt, the end of a document) show the token alone. A line
    separates packed documents.

    Args:
        spell_class: names the classes where they are not the tokens that come next.
    """
    about = "next" if spell_class is None else "label"
    table = _table("", "token", about, f"p({about})", f"the teacher's first {choices}", "rest")
    distribution = example.targets.at(1.0)
    rows = {int(t): n for n, t in enumerate(example.target_positions)}
    lengths = example.segment_lengths if spell_class is None else example.segment_lengths[:0]
    ends = {int(end) - 1 for end in lengths.cumsum()}
    name = spell_class or spell
    for position, token in enumerate(example.input_ids):
        cells: list[Text | str] = [str(position), _spelt(spell, int(token))]
        if position in rows:
            cells += _expectation(example, distribution, rows[position], name, choices, per_line)
        else:
            cells += ["", "", "", ""]
        table.add_row(*cells, end_section=position in ends)
    return table


def class_table(example: CachedExample, label_names: Sequence[str] | None) -> Table:
    """The class probabilities of one example, the most probable first, its label marked."""
    table = _table("class", "p", "")
    distribution = example.targets.at(1.0)
    label = int(example.targets.label_ids[0])
    for class_id, probability in _ranked(distribution, 0):
        name = str(class_id) if label_names is None else label_names[class_id]
        mark = "the label" if class_id == label else ""
        table.add_row(Text(show_running(name)), f"{probability:.4f}", mark)
    rest = float(distribution.tail_mass[0])
    if distribution.ids.shape[1] < distribution.num_classes:
        table.add_row("all others", f"{rest:.4f}", "")
    return table


def label_table(example: CachedExample, label_names: Sequence[str]) -> Table:
    """The probability of each label of one example, the most probable first."""
    table = _table("label", "p", "")
    distribution = example.targets.at(1.0)
    found = [dict(_ranked(distribution, row)).get(1, 0.0) for row in range(len(label_names))]
    for label in sorted(range(len(found)), key=lambda label: -found[label]):
        mark = "applies" if int(example.targets.label_ids[label]) == 1 else ""
        table.add_row(Text(show_running(label_names[label])), f"{found[label]:.4f}", mark)
    return table


def span_table(example: CachedExample, spell: Spell, choices: int = 8) -> Table:
    """The tokens at which an answer most probably starts or ends, in the order of the text."""
    table = _table("", "token", "p(start)", "p(end)", "label")
    distribution = example.targets.at(1.0)
    found = [dict(_ranked(distribution, row)) for row in range(2)]
    labels = example.targets.label_ids.tolist()
    shown = {place for ranked in found for place in [*ranked][:choices]}
    for place in sorted(shown.union(label for label in labels if label != UNLABELLED)):
        if place < len(example.input_ids):
            marks = [
                end for end, label in zip(("start", "end"), labels, strict=True) if label == place
            ]
            cells = [f"{ranked.get(place, 0.0):.3f}" for ranked in found]
            token = _spelt(spell, int(example.input_ids[place]))
            table.add_row(str(place), token, *cells, " ".join(marks))
    return table


def _expectation(
    example: CachedExample,
    distribution: SparseDistribution,
    row: int,
    spell: Spell,
    choices: int,
    per_line: int,
) -> list[Text | str]:
    label = int(example.targets.label_ids[row])
    known = label != UNLABELLED
    probability = float(torch.exp(example.targets.label_log_probs[row]))
    pairs = [
        Text.assemble(_spelt(spell, i), f" {p:.2f}")
        for i, p in _ranked(distribution, row)[:choices]
    ]
    lines = [pairs[start : start + per_line] for start in range(0, len(pairs), per_line)]
    first = Text("\n").join(Text("  ").join(line) for line in lines)
    return [
        _spelt(spell, label) if known else "",
        f"{probability:.3f}" if known else ABSENT,
        first,
        f"{float(distribution.tail_mass[row]):.3f}",
    ]


def _ranked(distribution: SparseDistribution, row: int) -> list[tuple[int, float]]:
    """Kept (id, probability) of a row, the most probable first."""
    probabilities = distribution.log_probs[row].exp()
    order = probabilities.argsort(descending=True, stable=True)
    ids = distribution.ids[row][order].tolist()
    return list(zip(ids, probabilities[order].tolist(), strict=True))


def _spelt(spell: Spell, token: int) -> Text:
    return Text(isolate(show_invisible(spell(token))))


def _table(first: str, *others: str) -> Table:
    """Numbers on the right; a text column (its heading says whose) on the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first)
    for heading in others:
        text = heading in ("token", "next", "label", "") or heading.startswith("the teacher")
        table.add_column(heading, justify="left" if text else "right")
    return table
