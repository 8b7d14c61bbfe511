"""How the entries of a target become the columns of a file, and back.

    Entries (ids, logits, draws) -- codec.encode --> flat columns -- zstd by Arrow --> rows.arrow

A codec is its own configuration, lies in the manifest, and works on all the targets of a record
batch at once. Ids are sorted, and all but `exact` store them as differences in byte planes: one
column per byte, least significant first, which zstd packs to about three quarters of what it makes
of whole integers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config import StrictModel

MAX_CLASSES = 2**20
_PLACE_BITS = 31  # of a place within a row, beside an id of at most 20 bits
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Entries:
    """The kept classes and the tail draws of N targets.

    Attributes:
        ids: [N, K] int64, distinct within a row, in any order.
        logits: [N, K] float32, finite.
        draw_ids: [N, R] int64, in any order, may repeat.
        draw_logits: [N, R] float32, finite.
    """

    ids: np.ndarray
    logits: np.ndarray
    draw_ids: np.ndarray
    draw_logits: np.ndarray


@dataclass(frozen=True)
class Layout:
    """The sizes that a codec needs to know: V classes, K kept, R drawn."""

    num_classes: int
    top_k: int
    tail_draws: int


class Codec(StrictModel, ABC):
    """A member of the family: `encode` and `decode` are inverse up to the promised error."""

    name: str

    @abstractmethod
    def columns(self, layout: Layout) -> dict[str, tuple[str, int]]:
        """Column name -> (numpy dtype, entries per target), in the order of the file."""

    @abstractmethod
    def encode(self, entries: Entries, layout: Layout) -> Columns:
        """Return one [N, entries per target] array for each of `columns(layout)`."""

    @abstractmethod
    def decode(self, columns: Mapping[str, np.ndarray], layout: Layout) -> Entries:
        """Return fresh arrays, ids ascending within each row."""


class Exact(Codec):
    """int32 ids and float32 logits: 8 bytes an entry before zstd, bit for bit."""

    name: Literal["exact"] = "exact"

    def columns(self, layout: Layout) -> dict[str, tuple[str, int]]:
        """Ids and logits as they are."""
        kept = {"ids": ("int32", layout.top_k), "logits": ("float32", layout.top_k)}
        draws = {
            "draw_ids": ("int32", layout.tail_draws),
            "draw_logits": ("float32", layout.tail_draws),
        }
        return {name: kind for name, kind in (kept | draws).items() if kind[1]}

    def encode(self, entries: Entries, layout: Layout) -> Columns:
        """Sort by id, nothing else."""
        ids, logits = _sort_by_id(entries.ids, entries.logits)
        draw_ids, draw_logits = _sort_by_id(entries.draw_ids, entries.draw_logits)
        columns = {
            "ids": ids.astype(np.int32),
            "logits": logits,
            "draw_ids": draw_ids.astype(np.int32),
            "draw_logits": draw_logits,
        }
        return {name: columns[name] for name in self.columns(layout)}

    def decode(self, columns: Mapping[str, np.ndarray], layout: Layout) -> Entries:
        """Widen the ids."""
        rows = len(next(iter(columns.values())))
        none = np.zeros((rows, 0))
        return Entries(
            ids=columns.get("ids", none).astype(np.int64),
            logits=columns.get("logits", none).astype(np.float32),
            draw_ids=columns.get("draw_ids", none).astype(np.int64),
            draw_logits=columns.get("draw_logits", none).astype(np.float32),
        )


class BelowHead(Codec):
    """Ids as differences; each logit as its distance below a float32 `head` of the target.

    The highest logit alone has distance 0, so no rounding changes the teacher's first choice; of
    equal highest logits the one with the smallest id counts as first. Without kept classes the head
    is the highest draw.
    """

    @property
    @abstractmethod
    def _distance(self) -> tuple[str, str]:
        """Name and numpy dtype of the columns that hold distances."""

    @abstractmethod
    def _encode_distance(self, distance: np.ndarray) -> np.ndarray:
        """Round float32 distances, negative ones to 0."""

    @abstractmethod
    def _decode_distance(self, encoded: np.ndarray) -> np.ndarray:
        """Return float32 distances."""

    @abstractmethod
    def _smallest(self) -> np.ndarray:
        """The first encoded distance above 0."""

    def columns(self, layout: Layout) -> dict[str, tuple[str, int]]:
        """Byte planes of the ids, the head, the distances."""
        name, dtype = self._distance
        kinds: dict[str, tuple[str, int]] = {"head": ("float32", 1)}
        for prefix, width in (("", layout.top_k), ("draw_", layout.tail_draws)):
            if width:
                planes = range(count_planes(layout.num_classes))
                kinds |= {f"{prefix}id_gap_{plane}": ("uint8", width) for plane in planes}
                kinds[f"{prefix}{name}"] = (dtype, width)
        return kinds

    def encode(self, entries: Entries, layout: Layout) -> Columns:
        """Sort by id, take differences, choose the head that keeps the mass, round."""
        name, _ = self._distance
        columns: Columns = {}
        head = entries.draw_logits.max(axis=1, keepdims=True) if layout.tail_draws else None
        if layout.top_k:
            ids, logits = _sort_by_id(entries.ids, entries.logits)
            encoded, head = self._encode_kept(logits)
            columns |= _split_gaps(ids, layout.num_classes, "")
            columns[name] = encoded
        assert head is not None  # a target without any entry is refused with the config
        columns["head"] = head.astype(np.float32)
        if layout.tail_draws:
            ids, logits = _sort_by_id(entries.draw_ids, entries.draw_logits)
            distance = columns["head"] - logits
            columns |= _split_gaps(ids, layout.num_classes, "draw_")
            columns[f"draw_{name}"] = self._encode_distance(distance)
        return columns

    def decode(self, columns: Mapping[str, np.ndarray], layout: Layout) -> Entries:
        """Add up the differences, subtract the distances from the head."""
        name, _ = self._distance
        head = columns["head"]
        parts: list[np.ndarray] = []
        for prefix, width in (("", layout.top_k), ("draw_", layout.tail_draws)):
            if width:
                parts.append(_join_gaps(columns, layout.num_classes, prefix))
                parts.append(head - self._decode_distance(columns[prefix + name]))
            else:
                parts.append(np.zeros((len(head), 0), dtype=np.int64))
                parts.append(np.zeros((len(head), 0), dtype=np.float32))
        return Entries(*parts)

    def _encode_kept(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and the head with which the decoded kept mass at T = 1 is the true one."""
        top = logits.argmax(axis=1)[:, None]
        highest = np.take_along_axis(logits, top, axis=1)
        distance = highest - logits
        encoded = np.maximum(self._encode_distance(distance), self._smallest())
        np.put_along_axis(encoded, top, 0, axis=1)
        decoded = self._decode_distance(encoded)
        shift = np.log(np.exp(-distance).sum(axis=1) / np.exp(-decoded).sum(axis=1))
        return encoded, highest + shift[:, None]


class Half(BelowHead):
    """float16 distances: relative error 2^-11, up to 65,504 nats below the head."""

    name: Literal["half"] = "half"

    @property
    def _distance(self) -> tuple[str, str]:
        return "below", "float16"

    def _encode_distance(self, distance: np.ndarray) -> np.ndarray:
        clipped = np.clip(distance, 0.0, np.finfo(np.float16).max)
        encoded: np.ndarray = clipped.astype(np.float16)
        return encoded

    def _decode_distance(self, encoded: np.ndarray) -> np.ndarray:
        return encoded.astype(np.float32)

    def _smallest(self) -> np.ndarray:
        return np.asarray(np.finfo(np.float16).smallest_subnormal)


_BEND = 2.0  # nats below the head at which a step has doubled


class Steps(BelowHead):
    """8-bit steps that widen with the distance d below the head: step * (1 + d / 2) nats.

    An error matters in proportion to the probability, which falls with exp(-d): wider steps far
    down cost less KL than the bytes they save. A logit is off by half a step, by a whole one next
    to the highest. The last step is 2 * (exp(255 * step / 2) - 1) nats down, 105 by default;
    anything lower, draws included, is put there, where exp(-d) is no longer a float32.

    Attributes:
        step: nats, the width of the first step. Half of it costs about 7 bytes more per target of
            50 entries and has a third of the KL.
    """

    name: Literal["steps"] = "steps"
    step: float = Field(default=1 / 32, ge=1 / 40, le=1 / 4)

    @property
    def _distance(self) -> tuple[str, str]:
        return "steps", "uint8"

    def _encode_distance(self, distance: np.ndarray) -> np.ndarray:
        steps = np.log1p(np.maximum(distance, 0.0) / _BEND) * np.float32(_BEND / self.step)
        encoded: np.ndarray = np.minimum(np.rint(steps), 255).astype(np.uint8)
        return encoded

    def _decode_distance(self, encoded: np.ndarray) -> np.ndarray:
        decoded: np.ndarray = _list_nats(self.step)[encoded]
        return decoded

    def _smallest(self) -> np.ndarray:
        return np.asarray(1, dtype=np.uint8)


CODECS: dict[str, type[Codec]] = {"steps": Steps, "half": Half, "exact": Exact}


@cache
def _list_nats(step: float) -> np.ndarray:
    """Nats below the head of each of the 256 steps."""
    nats: np.ndarray = _BEND * np.expm1(np.arange(256) * (step / _BEND))
    return nats.astype(np.float32)


def count_planes(num_classes: int) -> int:
    """Bytes that the largest id difference, V - 1, needs."""
    return max(1, ((num_classes - 1).bit_length() + 7) // 8)


def _sort_by_id(ids: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Sorting one integer, id before place, is several times faster than a stable argsort.
    keys = np.sort((ids << _PLACE_BITS) | np.arange(ids.shape[1]), axis=1)
    order = keys & (2**_PLACE_BITS - 1)
    return keys >> _PLACE_BITS, np.take_along_axis(logits, order, axis=1)


def _split_gaps(ids: np.ndarray, num_classes: int, prefix: str) -> Columns:
    gaps = np.diff(ids, axis=1, prepend=0)
    return {
        f"{prefix}id_gap_{plane}": (gaps >> (8 * plane)).astype(np.uint8)
        for plane in range(count_planes(num_classes))
    }


def _join_gaps(columns: Mapping[str, np.ndarray], num_classes: int, prefix: str) -> np.ndarray:
    gaps = columns[f"{prefix}id_gap_0"].astype(np.int32)
    for plane in range(1, count_planes(num_classes)):
        gaps |= columns[f"{prefix}id_gap_{plane}"].astype(np.int32) << (8 * plane)
    return np.cumsum(gaps, axis=1, dtype=np.int64)
