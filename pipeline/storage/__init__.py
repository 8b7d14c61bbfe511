"""Where a cache lies: a folder of this machine, or a prefix of an object store.

    text -- as_path --> Path, or UPath for s3://, gs://, az://, hf://, memory://

Either is joined by `/` and read by `read_bytes`; this room has what differs.

    places     from text to path; whose file system is asked (`patience`: again and again)
    files      whole files and folders: written so that they are there whole or not at all
    listing    which files there are, how large, and that they go
    ranges     parts of a file: mapped into memory here, fetched, `kept` near and ahead elsewhere
    staging    folders of this machine for what is on its way to a store
"""

from pipeline.storage.files import (
    SMALL_BYTES,
    create_object,
    fetch_file,
    hash_file,
    local_folder,
    map_file,
    read_small,
    reading,
    rewriting,
    write_bytes,
    writing,
    writing_folder,
)
from pipeline.storage.kept import kept_ranges, local_root
from pipeline.storage.listing import (
    find_size,
    list_files,
    remove_file,
    remove_folder,
    remove_tree,
)
from pipeline.storage.patience import read_seconds
from pipeline.storage.places import Folder, Location, as_folder, as_path, is_local
from pipeline.storage.ranges import RangeReader, open_file, read_into, read_known, read_known_ahead
from pipeline.storage.staging import scratch_folder, staging
from pipeline.storage.syncing import sync_file, sync_folder, sync_tree

__all__ = [
    "SMALL_BYTES",
    "Folder",
    "Location",
    "RangeReader",
    "as_folder",
    "as_path",
    "create_object",
    "fetch_file",
    "find_size",
    "hash_file",
    "is_local",
    "kept_ranges",
    "list_files",
    "local_folder",
    "local_root",
    "map_file",
    "open_file",
    "read_into",
    "read_known",
    "read_known_ahead",
    "read_seconds",
    "read_small",
    "reading",
    "remove_file",
    "remove_folder",
    "remove_tree",
    "rewriting",
    "scratch_folder",
    "staging",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "write_bytes",
    "writing",
    "writing_folder",
]
