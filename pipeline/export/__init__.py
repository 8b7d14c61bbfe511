"""A finished student in the forms that people deploy it in."""

from pipeline.export.folder import (
    copy_tokenizer,
    copy_weights,
    drop_weights,
    weight_bytes,
    write_settings,
)
from pipeline.export.graph import GraphStudent, require_onnx, save_onnx
from pipeline.export.hub import check_repository, list_upload, push
from pipeline.export.int8 import load_int8, quantize, save_int8

__all__ = [
    "GraphStudent",
    "check_repository",
    "copy_tokenizer",
    "copy_weights",
    "drop_weights",
    "list_upload",
    "load_int8",
    "push",
    "quantize",
    "require_onnx",
    "save_int8",
    "save_onnx",
    "weight_bytes",
    "write_settings",
]
