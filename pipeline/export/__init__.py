"""A finished student in the forms that people deploy it in."""

from pipeline.export.folder import copy_tokenizer, copy_weights, save_as, weight_bytes
from pipeline.export.graph import GraphStudent, require_onnx, save_onnx
from pipeline.export.int8 import load_int8, quantize, save_int8

__all__ = [
    "GraphStudent",
    "copy_tokenizer",
    "copy_weights",
    "load_int8",
    "quantize",
    "require_onnx",
    "save_as",
    "save_int8",
    "save_onnx",
    "weight_bytes",
]
