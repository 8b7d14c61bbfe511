"""The shelf: what a teacher said, in files, by example.

    CacheWriter(path, draft) -- shard(i).add(example) --> files -- TeacherCache.open(path) --> [i]

It knows arrays and files, never a model or a loss. data/README.md describes the files.
"""

from pipeline.cache.codecs import CODECS, Codec
from pipeline.cache.contents import digest_set, find_other
from pipeline.cache.documents import require_same
from pipeline.cache.groups import MOST_GROUPS, group_rows, locate
from pipeline.cache.imported import Imported
from pipeline.cache.index import RowRuns, hash_id
from pipeline.cache.manifest import (
    DRAFT,
    MANIFEST,
    Draft,
    Identity,
    Manifest,
    read_draft,
    read_manifest,
)
from pipeline.cache.order import EpochOrder, epoch_order
from pipeline.cache.output_head import read_head, write_head
from pipeline.cache.projection import (
    PROJECTIONS,
    Projection,
    copy_bases,
    has_bases,
    read_bases,
    require_vectors,
)
from pipeline.cache.quantization import VectorType
from pipeline.cache.reader import STREAM_BLOCK, TeacherCache
from pipeline.cache.shard_writer import ShardWriter
from pipeline.cache.signals import Signal
from pipeline.cache.targets_spec import TargetsSpec
from pipeline.cache.view import (
    CacheView,
    hash_rows,
    list_parts,
    list_sources,
    select_rows,
    write_view,
)
from pipeline.cache.view_manifest import require_alike, require_fits, require_overlaid
from pipeline.cache.view_parts import Overlay, Part, all_rows
from pipeline.cache.writer import CacheWriter

__all__ = [
    "CODECS",
    "DRAFT",
    "MANIFEST",
    "MOST_GROUPS",
    "PROJECTIONS",
    "STREAM_BLOCK",
    "CacheView",
    "CacheWriter",
    "Codec",
    "Draft",
    "EpochOrder",
    "Identity",
    "Imported",
    "Manifest",
    "Overlay",
    "Part",
    "Projection",
    "RowRuns",
    "ShardWriter",
    "Signal",
    "TargetsSpec",
    "TeacherCache",
    "VectorType",
    "all_rows",
    "copy_bases",
    "digest_set",
    "epoch_order",
    "find_other",
    "group_rows",
    "has_bases",
    "hash_id",
    "hash_rows",
    "list_parts",
    "list_sources",
    "locate",
    "read_bases",
    "read_draft",
    "read_head",
    "read_manifest",
    "require_alike",
    "require_fits",
    "require_overlaid",
    "require_same",
    "require_vectors",
    "select_rows",
    "write_head",
    "write_view",
]
