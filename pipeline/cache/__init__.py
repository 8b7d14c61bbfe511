"""The shelf: what a teacher said, in files, by example.

    CacheWriter(path, draft) -- shard(i).add(example) --> files -- TeacherCache.open(path) --> [i]

It knows arrays and files, never a model or a loss. data/README.md describes the files.
"""

from pipeline.cache.codecs import CODECS, Codec
from pipeline.cache.documents import require_same
from pipeline.cache.imported import Imported
from pipeline.cache.index.contents import digest_set, find_other
from pipeline.cache.index.groups import MOST_GROUPS, group_rows, locate
from pipeline.cache.index.splits import RowRuns, hash_id
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
from pipeline.cache.reader import STREAM_BLOCK, TeacherCache
from pipeline.cache.shard_writer import ShardWriter
from pipeline.cache.signals.projection import (
    PROJECTIONS,
    Projection,
    copy_bases,
    has_bases,
    read_bases,
    require_vectors,
)
from pipeline.cache.signals.quantization import VectorType
from pipeline.cache.signals.spec import Signal
from pipeline.cache.targets_spec import TargetsSpec
from pipeline.cache.views.manifest import require_alike, require_fits, require_overlaid
from pipeline.cache.views.parts import Overlay, Part, all_rows
from pipeline.cache.views.view import (
    CacheView,
    hash_rows,
    list_parts,
    list_sources,
    require_room,
    select_rows,
    write_view,
)
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
    "require_room",
    "require_same",
    "require_vectors",
    "select_rows",
    "write_head",
    "write_view",
]
