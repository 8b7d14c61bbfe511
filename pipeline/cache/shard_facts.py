"""What shard.json says, compared with the manifest and with itself, before a row is looked for."""

from pipeline.cache.manifest import Draft, ShardInfo
from pipeline.cache.signals.spec import list_arrays

_LEAST = 2**30  # bytes that the vectors of any shard may take
_RATIO = 100  # times the files of a larger one, of which chunks of zeros are left out


def require_consistent(info: ShardInfo, draft: Draft, index: int) -> None:
    """Refuse a shard of other rows than its number says, or of vectors that nobody wrote.

    Raises:
        ValueError: names the first thing that does not fit.
    """
    rows = draft.shard_size(index)
    if (info.index, info.first_row, info.examples) != (index, index * draft.shard_examples, rows):
        raise ValueError(
            f"shard {info.index} of {info.examples} examples from row {info.first_row} on, expected"
            f" shard {index} of {rows} from row {index * draft.shard_examples} on"
        )
    if sum(batch[0] for batch in info.batches) != rows or not all(b[0] for b in info.batches):
        raise ValueError(f"record batches of other than {rows} examples")
    for name, kind in list_arrays(draft.signals).items():
        prefix = f"hidden.zarr/{name}/"
        files = sum(size for path, (size, _) in info.files.items() if path.startswith(prefix))
        claimed = info.features * kind.row_bytes
        if claimed > max(_LEAST, _RATIO * files):
            raise ValueError(f"{files:,} bytes of {name} claim to hold {claimed:,}")
