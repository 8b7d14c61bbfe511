"""A reader of caches written from data/README.md alone: pyarrow, zarr and numpy, nothing of ours.

    Cache(folder)[row] -> what an example holds    .find(id) -> row    .rows_where(column, value)

It stands for all readers that strangers write: what it needs and the page lacks, the page lacks.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray

Array = NDArray[Any]
_CODES = np.arange(256)
_EXPONENTS = _CODES >> 3 & 15
_SIZES = np.ldexp(_CODES % 8 + 8.0 * (_EXPONENTS > 0), np.maximum(_EXPONENTS, 1) - 10)
FLOAT8 = np.where(_CODES < 128, _SIZES, -_SIZES).astype(np.float32)


def _read_arrow(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_safetensors(path: Path) -> dict[str, Array]:
    """The float32 arrays of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {k: v for k, v in json.loads(content[8:start]).items() if k != "__metadata__"}
    spans = {name: content[start:][slice(*v["data_offsets"])] for name, v in arrays.items()}
    return {k: np.frombuffer(spans[k], "<f4").reshape(v["shape"]) for k, v in arrays.items()}


class Cache:
    """A cache of format version 1 in a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_bytes())
        self.signals: dict[str, Any] = self.manifest["signals"]
        known = self.manifest["version"] == 1 and not self.manifest.get("requires")
        assert known, f"{folder}: needs a newer reader"
        self._digests = _read_arrow(folder / "index" / "shards.arrow")["sha256"].to_pylist()

    def __len__(self) -> int:
        return int(self.manifest["num_examples"])

    def find(self, example_id: str) -> int:
        index = _read_arrow(self.folder / "index" / "ids.arrow")
        hashes, wanted = index["hash"].to_numpy(), np.uint64(_hash(example_id))
        span = slice(*(np.searchsorted(hashes, wanted, side=side) for side in ("left", "right")))
        for row in index["row"].to_numpy()[span].tolist():
            if self[row]["example_id"] == example_id:
                return int(row)
        raise KeyError(example_id)

    def rows_where(self, column: str, value: str) -> list[int]:
        """The rows of a split, or of a value of another column as Python's `str` shows it."""
        name = "split" if column == "split" else f"columns/{_hash(column):016x}"
        table = _read_arrow(self.folder / "index" / f"{name}.arrow")
        runs = [run.values() for run in table.to_pylist()]
        spans = [range(first, first + rows) for own, first, rows in runs if own == value]
        return [row for span in spans for row in span]

    def __getitem__(self, row: int) -> dict[str, Any]:
        number, inside = divmod(row, self.manifest["shard_examples"])
        folder = self.folder / "shards" / f"{number:05d}"
        content = (folder / "shard.json").read_bytes()
        assert hashlib.sha256(content).digest() == self._digests[number], f"{folder}: damaged"
        shard = json.loads(content)
        for name, (size, digest) in shard["files"].items():
            held = (folder / name).read_bytes()
            assert [len(held), hashlib.sha256(held).hexdigest()] == [size, digest], folder / name
        table = _read_arrow(folder / "rows.arrow")
        found = {name: table[name][inside] for name in table.column_names}
        targets = found["targets"].values
        fields = {field.name: _values(targets.field(field.name)) for field in targets.type}
        frequent = np.array(shard["frequent_ids"].split(), dtype=int)
        others = np.setdiff1d(np.arange(self.manifest["num_classes"]), frequent)
        ids, spec = np.concatenate([frequent, others]), self.manifest["targets"]
        return {
            "example_id": found["example_id"].as_py(),
            "columns": {name: found[name].as_py() for name in self.manifest["columns"]},
            "input_ids": found["input_ids"].values.to_numpy(),
            "segment_lengths": found["segment_lengths"].values.to_numpy(),
            "target_positions": fields["position"][:, 0],
            "label_ids": fields["label_id"][:, 0],
            "ids": ids[_planes(fields, "gap").cumsum(axis=1)],
            "draw_ids": ids[_planes(fields, "draw_gap").cumsum(axis=1)],
            **(_exact(fields) if spec["codec"]["name"] == "lossless" else _steps(fields, spec)),
            "hidden": {name: self._vectors(folder, name, inside, found) for name in self.signals},
        }

    def _vectors(self, folder: Path, name: str, inside: int, found: dict[str, Any]) -> Array:
        group, signal = zarr.open_group(folder / "hidden.zarr", mode="r"), self.signals[name]
        first, count = inside, 1
        if signal["per"] == "feature":
            first, count = (found[f"feature_{key}"].as_py() for key in ("start", "count"))
        numbers = np.asarray(group[name][first : first + count])  # type: ignore[index]
        if signal["dtype"] == "bfloat16":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        numbers = FLOAT8[numbers] if signal["dtype"] == "float8_e4m3fn" else numbers
        if f"{name}.scale" in group:
            return numbers * np.asarray(group[f"{name}.scale"][first : first + count])  # type: ignore[index]
        return numbers.astype(np.float32)


def _values(column: pa.Array) -> Array:
    """[N, values] of a field."""
    several = pa.types.is_fixed_size_list(column.type)
    width = column.type.list_size if several else 1
    return (column.flatten() if several else column).to_numpy().reshape(len(column), width)


def _planes(fields: dict[str, Array], prefix: str) -> Array:
    """Numbers [N, values] whose bytes are in the fields `<prefix>_0`, the lowest, and so on."""
    parts = [fields[name] for place in range(4) if (name := f"{prefix}_{place}") in fields]
    numbers = [part.astype(np.uint32) << 8 * place for place, part in enumerate(parts)]
    return np.sum(numbers, 0, np.uint32) if parts else np.zeros((len(fields["position"]), 0), "u4")


def _exact(fields: dict[str, Array]) -> dict[str, Array]:
    logits = {f"{x}logits": _planes(fields, f"{x}logit").view("<f4") for x in ("", "draw_")}
    label = fields["label_log_prob"][:, 0]
    return {**logits, "logsumexp": fields["logsumexp"], "label_log_probs": label}


def _steps(fields: dict[str, Array], spec: dict[str, Any]) -> dict[str, Array]:
    highest, temperatures = spec["codec"]["levels"], spec["temperatures"]
    kept = {"floor": "<u2" if highest > 208 else "u1"} if spec["top_k"] else {}
    kept |= {str(t): "<i4" if t < 1 else "<i2" for t in temperatures if kept or t != 1}
    head = fields["head"].copy().view(np.dtype([*kept.items(), ("label", "<u2")]))[:, 0]
    steps = [head[str(t)] if str(t) in kept else np.zeros(len(head)) for t in temperatures]
    levels = _planes(fields, "level").astype(int) + (head["floor"][:, None] if spec["top_k"] else 0)
    roots = 4 * np.log((np.maximum(levels, 48) - 47) / highest)
    return {
        "logits": np.where(levels >= 48, roots, 4 * np.log(1 / highest) - 2 * (48 - levels)),
        "draw_logits": fields.get("draw_level", np.zeros((len(head), 0))) / -4,
        "logsumexp": np.stack(steps, 1) / [2**14 if t == 1 else 2**11 for t in temperatures],
        "label_log_probs": head["label"] / -128,
    }
