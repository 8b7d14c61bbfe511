"""Caches for people without Stillroom, and the dumps of others as caches.

    TeacherCache -- tabulate --> plain columns -- write_parquet | write_jsonl --> a file
    files -- Dump.records --> Record -- require_sound --> Sound -- keep --> CachedExample

A foreign format is one class and one line here.
"""

from pipeline.exchange.containers import plain, read_rows
from pipeline.exchange.distillkit import DistillKit
from pipeline.exchange.dump import Dump, Facts
from pipeline.exchange.plain import CARRIED, tabulate
from pipeline.exchange.plain_dump import PlainDump
from pipeline.exchange.records import Findings, Sound, Space, require_sound
from pipeline.exchange.writing import PLAIN_FORMATS

__all__ = [
    "CARRIED",
    "DUMPS",
    "PLAIN_FORMATS",
    "DistillKit",
    "Dump",
    "Facts",
    "Findings",
    "PlainDump",
    "Sound",
    "Space",
    "plain",
    "read_rows",
    "require_sound",
    "tabulate",
]

DUMPS: dict[str, type[Dump]] = {"distillkit": DistillKit, "stillroom": PlainDump}
