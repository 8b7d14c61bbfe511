"""Look into a cache: what it was made from, what it holds, what the teacher said of one example.

cache -> manifest -> identity and counts; a sample of examples -> survey; or one example by id
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cache import CacheView, Manifest, Signal, TeacherCache, list_sources
from pipeline.cache.sizes import column_bytes
from pipeline.examples import LANGUAGE_COLUMNS, CachedExample
from pipeline.report.contents import (
    Spell,
    bytes_table,
    class_table,
    label_table,
    span_table,
    survey_table,
    token_table,
)
from pipeline.report.rows import ABSENT, format_bytes
from pipeline.report.survey import survey_examples
from pipeline.report.text import show_invisible, show_running
from pipeline.safe_loading import open_tokenizer
from stages.naming import name_teacher

SAMPLE_EXAMPLES = 512  # enough for percentiles; a whole large cache would take hours to read
_DIGEST_LETTERS = 12
_DIGEST = re.compile("[0-9a-f]{32,}")
_MOST_SHOWN = 20  # skipped examples
_WIDE = 110  # from here on, four choices of the teacher stand on one line


def inspect(
    cache_path: Path, example_id: str | None = None, console: Console | None = None
) -> None:
    """Print what a cache is and holds, or, with an id, one of its examples.

    Raises:
        CacheError: no cache, an unfinished or damaged one, or no example of that id.
    """
    console = console or Console()
    cache = TeacherCache.open(cache_path)
    if example_id is None:
        _print_cache(cache, console)
    else:
        _print_example(cache, cache.by_id(example_id), console)


def _print_cache(cache: TeacherCache, console: Console) -> None:
    manifest = cache.manifest
    console.print(Text(str(cache.path), style="bold"))
    facts = {**_identity(manifest), **_contents(cache), **_count_languages(cache)}
    if name := name_teacher(cache):
        facts["teacher"] = f"{name} · {facts['teacher']}"
    console.print(_facts_table(facts))
    console.print()
    console.print(bytes_table(column_bytes(cache), manifest.totals.tokens))
    if manifest.fidelity:
        console.print()
        console.print(_fidelity_table(manifest))
    if cache.skipped:
        console.print()
        console.print(_skipped_table(cache))
    sample = _sample_rows(len(cache))
    survey = survey_examples(_read(cache, sample))
    everything = "all" if len(sample) == len(cache) else "evenly spaced"
    read = f"{survey.examples:,} of {len(cache):,} examples ({everything})"
    console.print()
    console.print(
        Text(f"{read}, {len(survey.kept_mass):,} targets, {len(survey.label_loss):,} with a label")
    )
    console.print(survey_table(survey))
    console.print(Text(_explain_bounds(manifest) + _explain_labels(manifest)))


def _skipped_table(cache: TeacherCache) -> Table:
    title = f"without targets: {len(cache.skipped):,} of {len(cache):,}"
    table = Table("skipped", "why", title=title)
    for example_id, reason in islice(cache.skipped.items(), _MOST_SHOWN):
        table.add_row(Text(show_invisible(example_id)), Text(show_running(reason)))
    return table


def _print_example(cache: TeacherCache, example: CachedExample, console: Console) -> None:
    manifest = cache.manifest
    console.print(Text(show_invisible(example.example_id), style="bold"))
    facts = {name: _brief(value) for name, value in example.columns.items()}
    facts["tokens"] = f"{len(example.input_ids):,}, {len(example.targets):,} targets"
    for name, vectors in example.hidden.items():
        facts[name] = " × ".join(str(size) for size in vectors.shape)
    spell, decode = _load_speller(cache)
    if not manifest.shifted:
        facts["text"] = decode(example.input_ids)
    console.print(_facts_table(facts))
    console.print()
    names = manifest.label_names
    if manifest.task["name"] == "question-answering":
        console.print(span_table(example, spell))
    elif manifest.task["name"] == "multi-label-classification":
        console.print(label_table(example, names or []))
    elif not manifest.shifted and len(example.targets) == 1:
        console.print(class_table(example, names))
    else:
        named = spell if names is None else names.__getitem__
        per_line = 4 if console.width >= _WIDE else 2
        spell_class = None if manifest.shifted else named
        console.print(token_table(example, spell, spell_class, per_line=per_line))


def _explain_bounds(manifest: Manifest) -> str:
    if manifest.layout.top_k == manifest.num_classes:
        return (
            "Entropy and loss are in nats. The entropy is the teacher's own; every class is kept,"
            " so low and high are one."
        )
    return (
        "Entropy and loss are in nats. The entropy is the teacher's own, exact on the kept"
        " classes; low: the rest of the mass heaped up, no class above the least kept one; high:"
        " spread evenly."
    )


def _explain_labels(manifest: Manifest) -> str:
    rows = {} if manifest.imported is None else manifest.imported.rows
    if not rows.get("labels_bounded"):
        return ""
    return (
        f" Of {rows['labels_bounded']} of {rows.get('labels')} imported labels no more is known"
        " than the least loss that they can have."
    )


def _identity(manifest: Manifest) -> dict[str, str]:
    identity = manifest.identity.model_dump()
    facts = {part: _describe(found) for part, found in identity.items()}
    if manifest.imported is not None:
        facts["imported"] = manifest.imported.describe()
        facts["rows"] = _describe(manifest.imported.rows)
        if manifest.imported.not_known:
            facts["not known"] = "; ".join(manifest.imported.not_known)
    return {"cache": manifest.digest[:_DIGEST_LETTERS], **facts, "task": _describe(manifest.task)}


def _contents(cache: TeacherCache) -> dict[str, str]:
    manifest = cache.manifest
    totals, layout, targets = manifest.totals, manifest.layout, manifest.targets
    kept = f"the {layout.top_k:,} highest of {layout.num_classes:,} classes"
    if layout.top_k == layout.num_classes:
        kept = f"all {layout.num_classes:,} classes"
    draws = f", {layout.tail_draws} draws from the rest" if layout.tail_draws else ""
    exact = ", ".join(f"{t:g}" for t in targets.temperatures)
    per_token = totals.bytes / max(totals.tokens, 1)
    facts = {
        "examples": f"{totals.examples:,}",
        **_list_sources(cache),
        "tokens": f"{totals.tokens:,}",
        "targets": f"{totals.targets:,}, each {kept}{draws}, exact at T = {exact}",
        "size": f"{format_bytes(totals.bytes)}, {per_token:,.1f} bytes per token",
        "codec": _describe(targets.codec.model_dump()),
    }
    for name, signal in manifest.signals.items():
        facts[name] = _describe_signal(manifest, signal)
    if manifest.columns:
        facts["columns"] = ", ".join(manifest.columns)
    if manifest.label_names:
        facts["labels"] = ", ".join(manifest.label_names)
    return facts


def _list_sources(cache: TeacherCache) -> dict[str, str]:
    """The shards of a cache, or the caches of a view."""
    if not isinstance(cache, CacheView):
        return {"shards": f"{cache.manifest.num_shards:,}"}
    seen = [
        f"{len(source.rows):,} of {len(source.cache):,} examples of {source.cache.path}"
        for source in list_sources(cache)
    ]
    return {"sees": "; ".join(seen)}


def _count_languages(cache: TeacherCache) -> dict[str, str]:
    """The rows of each language, the most first, where the cache carries it."""
    facts = {}
    for column in (name for name in LANGUAGE_COLUMNS if name in cache.manifest.columns):
        rows = {name: len(places) for name, places in cache.group(column).items()}
        order = sorted(rows, key=lambda name: (-rows[name], name))
        facts[column] = ", ".join(f"{name} {rows[name]:,}" for name in order)
    return facts


def _describe_signal(manifest: Manifest, signal: Signal) -> str:
    kept = f"{signal.width} × {signal.dtype} per {signal.per}"
    if signal.projection is not None:
        kept += f", {signal.projection.name} projection of {signal.given_width}"
    if manifest.positions != "all" and signal.per == "feature":
        choice = manifest.positions
        kept += f", {choice if isinstance(choice, str) else f'one of {choice.every}'} positions"
    return kept


def _fidelity_table(manifest: Manifest) -> Table:
    """How near the kept hidden states are to the teacher's, in the first shard."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("hidden states")
    for heading in ("vectors", "cosine, 1 %", "mean", "relative MSE", "CKA", "variance kept"):
        table.add_column(heading, justify="right")
    for name, found in manifest.fidelity.items():
        kept = found.explained_variance
        table.add_row(
            Text(show_running(name)),
            f"{found.rows:,}",
            f"{found.cosine_p1:.5f}",
            f"{found.cosine:.5f}",
            f"{found.relative_mse:.2g}",
            ABSENT if found.cka is None else f"{found.cka:.5f}",
            ABSENT if kept is None else f"{100 * kept:.1f} %",
        )
    return table


def _sample_rows(count: int) -> np.ndarray:
    """At most SAMPLE_EXAMPLES rows, evenly spaced over the cache, ascending and distinct."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLE_EXAMPLES)).astype(np.int64))


def _read(cache: TeacherCache, rows: np.ndarray) -> Iterator[CachedExample]:
    return (cache[int(row)] for row in rows)


def _load_speller(cache: TeacherCache) -> tuple[Spell, Any]:
    tokenizer = open_tokenizer(cache.tokenizer_path)

    def spell(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
        text = str(tokenizer.decode([token]))
        if not text or "\ufffd" in text:  # part of a character: only the piece can be shown
            return str(piece)
        starts_word = str(piece).startswith("▁") and not text.startswith(" ")
        return f" {text}" if starts_word else text

    def decode(token_ids: np.ndarray) -> str:
        return str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    return spell, decode


def _describe(found: Mapping[str, Any]) -> str:
    """`key value` pairs on one line, digests shortened."""
    parts = []
    for key, value in found.items():
        if value is None or value == {} or value == []:
            continue
        brief = _brief(value)
        if _DIGEST.fullmatch(brief):
            brief = brief[:_DIGEST_LETTERS]
        parts.append(brief if key in ("digest", "name") else f"{key} {brief}")
    return " · ".join(parts)


def _brief(value: Any, limit: int = 100) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _facts_table(facts: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(show_running(name)), Text(show_running(value)))
    return table
