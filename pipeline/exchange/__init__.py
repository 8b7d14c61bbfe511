"""Caches for people without Stillroom, and the dumps of others as caches.

    TeacherCache -- tabulate --> plain columns -- write_parquet | write_jsonl --> a file
    files -- Dump.records --> Record -- require_sound --> Sound -- keep --> CachedExample

A foreign format is one class and one line here.
"""

from pipeline.exchange.axolotl import Axolotl
from pipeline.exchange.containers import plain, read_rows
from pipeline.exchange.distillkit import DistillKit
from pipeline.exchange.dump import Dump, Facts
from pipeline.exchange.plain import CARRIED, tabulate
from pipeline.exchange.plain_dump import PlainDump
from pipeline.exchange.records import Findings, Sound, Space, require_sound
from pipeline.exchange.responses import Responses
from pipeline.exchange.sglang import SGLang
from pipeline.exchange.writing import PLAIN_FORMATS

__all__ = [
    "CARRIED",
    "DUMPS",
    "PLAIN_FORMATS",
    "Dump",
    "Facts",
    "Findings",
    "Sound",
    "Space",
    "plain",
    "read_rows",
    "require_sound",
    "tabulate",
]

DUMPS: dict[str, type[Dump]] = {
    "axolotl": Axolotl,
    "distillkit": DistillKit,
    "openai": Responses,
    "sglang": SGLang,
    "stillroom": PlainDump,
    "vllm": Responses,
}
