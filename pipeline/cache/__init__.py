"""The shelf: what a teacher said, in files, by example.

    CacheWriter(path, draft) -- shard(i).add(example) --> files -- TeacherCache.open(path) --> [i]

It knows arrays and files, never a model or a loss. data/README.md describes the files.
"""

from pipeline.cache.codecs import CODECS, Codec
from pipeline.cache.manifest import (
    Draft,
    Identity,
    Manifest,
    Signal,
    TargetsSpec,
    read_manifest,
    require_same,
)
from pipeline.cache.order import EpochOrder, epoch_order
from pipeline.cache.quantization import VectorType
from pipeline.cache.reader import STREAM_BLOCK, TeacherCache
from pipeline.cache.shard_writer import ShardWriter
from pipeline.cache.writer import CacheWriter

__all__ = [
    "CODECS",
    "STREAM_BLOCK",
    "CacheWriter",
    "Codec",
    "Draft",
    "EpochOrder",
    "Identity",
    "Manifest",
    "ShardWriter",
    "Signal",
    "TargetsSpec",
    "TeacherCache",
    "VectorType",
    "epoch_order",
    "read_manifest",
    "require_same",
]
