"""The teacher's output head beside its cache, from which all logits can be made again.

OutputHead -- write_head --> head.safetensors (weight, bias, offset; scale and soft-cap beside them)
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import CacheError, say
from pipeline.heads import OutputHead
from pipeline.storage import hash_file, reading, write_bytes

FILE = "head.safetensors"


def write_head(cache: Path, head: OutputHead) -> None:
    """Write the head of V classes, without the rows that pad it."""
    classes = head.num_classes
    given = {"weight": head.weight, "bias": head.bias, "offset": head.offset}
    tensors = {
        name: tensor[:classes].detach().cpu().contiguous()
        for name, tensor in given.items()
        if tensor is not None
    }
    facts = {"scale": repr(head.scale), "soft_cap": repr(head.soft_cap)}
    write_bytes(cache / FILE, _order_metadata(save(tensors, metadata=facts)))


def read_head(cache: Path, digest: str | None) -> OutputHead:
    """Read the head of a cache.

    Args:
        digest: sha256 in the manifest, None where the cache has none.

    Raises:
        CacheError: none is kept, or the file is damaged.
    """
    if digest is None:
        raise CacheError(
            f"{cache}: keeps no output head; cache the teacher again with hidden.head: true"
        )
    file = cache / FILE
    if not file.is_file() or hash_file(file) != digest:
        raise CacheError(f"{file}: is missing or damaged; cache the teacher again")
    try:
        with reading(file) as local, safe_open(local, framework="pt") as stored:
            facts = stored.metadata()
            found = {name: stored.get_tensor(name) for name in list(stored.keys())}
        return _make_head(facts or {}, found)
    except (SafetensorError, LookupError, ValueError) as error:
        raise CacheError(
            f"{file}: cannot be read ({say(error)}); cache the teacher again"
        ) from error


def _make_head(facts: Mapping[str, str], found: Mapping[str, Tensor]) -> OutputHead:
    cap, scale, weight = facts["soft_cap"], float(facts["scale"]), found["weight"]
    soft_cap = None if cap == "None" else float(cap)
    bias, offset = found.get("bias"), found.get("offset")
    parts = [part for part in (bias, offset) if part is not None]
    fits = weight.ndim == 2 and all(part.shape == weight.shape[:1] for part in parts)
    if not fits or not all(part.is_floating_point() for part in found.values()):
        raise ValueError("its shapes or types do not fit one another")
    if not math.isfinite(scale) or (soft_cap is not None and not 0 < soft_cap < math.inf):
        raise ValueError(f"scale {scale}, soft-cap {soft_cap}")
    return OutputHead(weight, bias, scale, soft_cap, len(weight), offset)


def _order_metadata(content: bytes) -> bytes:
    """The same file with its metadata in order: safetensors writes them in another each time."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    return content[:8] + text.ljust(size) + content[8 + size :]
