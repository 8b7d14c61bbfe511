"""A finished student in the forms that people deploy it in."""

from pipeline.export.folder import copy_tokenizer, copy_weights, save_as, weight_bytes
from pipeline.export.int8 import load_int8, quantize, save_int8

__all__ = [
    "copy_tokenizer",
    "copy_weights",
    "load_int8",
    "quantize",
    "save_as",
    "save_int8",
    "weight_bytes",
]
