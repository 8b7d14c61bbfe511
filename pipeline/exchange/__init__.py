"""Caches for people without Stillroom, and the dumps of others as caches.

TeacherCache -- tabulate --> plain columns -- write_parquet | write_jsonl --> a file
"""

from pipeline.exchange.plain import tabulate
from pipeline.exchange.writing import PLAIN_FORMATS, write_jsonl, write_parquet

__all__ = ["PLAIN_FORMATS", "tabulate", "write_jsonl", "write_parquet"]
