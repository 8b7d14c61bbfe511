"""Probabilities in steps whose error weighs alike wherever it is made: the default.

    log p = logit - logsumexp(T = 1)
    ranks of ids -- differences --> gap planes    log p -- fourth root --> level above the floor
    floor, the normalisers that keep the mass, log p of the label --> head, a record per target

An error e of a log-probability costs p e^2 / 2 nats of KL at T = 1 and sqrt(p) e^2 / 8, over the
normaliser, at T = 2. Even steps of the fourth root of p have a width of 4 / (levels p^(1/4)) nats:
all entries then cost the same at T = 2, and about the same at T = 1, and no bit is spent on more.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.cache.codecs.base import Array, Codec, Columns, Decoded, Entries, Find, Layout
from pipeline.cache.codecs.planes import (
    add_rows,
    count_planes,
    join_ids,
    join_planes,
    make_like,
    name_planes,
    sort_ids,
    split_planes,
    split_ranks,
)
from pipeline.cache.codecs.ranking import LARGE

_PACKED = torch.contiguous_format
_BELOW = 48  # levels under the first of the fourth root, so many nats apart:
_BELOW_STEP = 2.0
_DRAW_STEP = 1 / 4  # nats; draws weigh alike, so their steps are even
_LABEL_STEP = 1 / 128  # nats
_ONE_STEP = 2.0**-14  # nats of the normaliser at T = 1, of others:
_OTHER_STEP = 2.0**-11


class Steps(Codec):
    """A level of the fourth root of the probability for each kept entry.

    With the highest logit in a level of its own the first choice stays the teacher's; of equal
    highest logits the one with the smallest id counts as first. The teacher's offset is not kept:
    decoded logits are log-probabilities plus the decoded logsumexp at T = 1, which lies near 0.

    Attributes:
        levels: between the probabilities 0 and 1. The mean KL(teacher || decoded) is
            2/3 / levels^2 nats times the sum of the roots of the kept probabilities at T = 1,
            which is at most sqrt(K), and K / 6 / levels^2 over the normaliser at T = 2. By default
            35 * K^(1/4), with which language models stay below 3e-4 nats at either.
    """

    name: Literal["steps"] = "steps"
    levels: int | None = Field(default=None, ge=8, le=4096)

    def resolve(self, top_k: int) -> "Steps":
        """Set the number of levels."""
        return self if self.levels else Steps(levels=round(35 * max(top_k, 1) ** 0.25))

    def columns(self, layout: Layout) -> dict[str, tuple[str, int]]:
        """Planes of gaps and levels, then what there is one of in each target."""
        gaps = count_planes(layout.num_classes - 1)
        kinds: dict[str, tuple[str, int]] = {}
        if layout.top_k:
            kinds |= name_planes("gap", gaps, layout.top_k)
            kinds |= name_planes("level", self._planes(layout), layout.top_k)
        if layout.tail_draws:
            kinds |= name_planes("draw_gap", gaps, layout.tail_draws)
            kinds["draw_level"] = ("uint8", layout.tail_draws)
        # One column, because what a small one costs to decompress is mostly to begin with it.
        kinds["head"] = ("uint8", self._head(layout).itemsize)
        return kinds

    def encode(self, entries: Entries, layout: Layout) -> Columns:
        """Sort by rank, round to levels, choose the normalisers that keep the mass."""
        columns: Columns = {}
        head = np.zeros(len(entries.logsumexp), self._head(layout))
        head["label"] = np.rint(entries.label_log_probs * (-1 / _LABEL_STEP)).clip(0, 2**16 - 1)
        one = entries.logsumexp[:, layout.temperatures.index(1.0), None]
        codes = np.zeros((len(head), 0), dtype=np.int32)
        if layout.top_k:
            ranks, codes = self._round_kept(entries, layout, one)
            head["floor"] = codes.min(axis=1)
            columns |= split_ranks(ranks, layout, "gap")
            above = codes - head["floor"][:, None]
            columns |= split_planes(above, "level", self._planes(layout))
        self._fill_normalisers(head, entries, layout, codes)
        if layout.tail_draws:
            ranks, _, logits = sort_ids(entries.draw_ids, entries.draw_logits, layout)
            columns |= split_ranks(ranks, layout, "draw_gap")
            log_probs = logits - one + _read_normaliser(head, layout, 1.0)[:, None]
            steps = np.rint(log_probs * (-1 / _DRAW_STEP))
            columns["draw_level"] = steps.clip(0, 255).astype(np.uint8)
        columns["head"] = head.view(np.uint8).reshape(len(head), -1)
        return columns

    def decode(
        self, columns: Mapping[str, Array], layout: Layout, find: Find, out: Decoded
    ) -> None:
        """Add up the differences, look up the levels."""
        head = _unpack(columns["head"], self._head(layout))
        if layout.top_k:
            join_ids(columns, layout, "gap", find, out.ids)
            self._read_logits(columns, layout, head["floor"], out.logits)
        if layout.tail_draws:
            join_ids(columns, layout, "draw_gap", find, out.draw_ids)
            _scale(columns["draw_level"], -_DRAW_STEP, out.draw_logits)
        for index, temperature in enumerate(layout.temperatures):
            if f"logsumexp_{index}" in head:
                read = head[f"logsumexp_{index}"]
                _scale(read, _step_at(temperature), out.logsumexp[:, index])
            else:
                out.logsumexp[:, index] = 0
        _scale(head["label"], -_LABEL_STEP, out.label_log_probs)

    def _read_logits(
        self, columns: Mapping[str, Array], layout: Layout, floor: Array, out: Array
    ) -> None:
        levels, one_byte = self.levels or 0, self._planes(layout) == 1
        if one_byte and isinstance(out, np.ndarray):
            codes = add_rows(columns["level_0"], floor)
            if codes.size >= LARGE and codes.size % 2 == 0:
                # Two at a time, as one number of 16 bits: a gather costs by the piece.
                both = make_like(out, "codes", (codes.size // 2,), "int32")
                both[...] = codes.reshape(-1).view("<u2")
                pairs = torch.from_numpy(out.reshape(-1).view(np.int64))
                torch.index_select(_pair_log_probs(levels), 0, torch.from_numpy(both), out=pairs)
            else:
                self._log_probs.take(codes, mode="clip", out=out)
            return
        codes = make_like(out, "codes", out.shape, "int32")
        join_planes(columns, "level", self._planes(layout), codes)
        codes += floor[:, None]
        if isinstance(out, np.ndarray):
            self._log_probs.take(codes, mode="clip", out=out)
        else:
            table = _place_log_probs(levels, out.device)
            codes.clamp_(max=len(table) - 1)
            torch.index_select(table, 0, codes.view(-1), out=out.view(-1))

    @property
    def _log_probs(self) -> np.ndarray:
        assert self.levels is not None  # resolved before anything is written
        return _list_log_probs(self.levels)

    def _planes(self, layout: Layout) -> int:
        return count_planes(len(self._log_probs) - 1)

    def _head(self, layout: Layout) -> np.dtype[np.void]:
        return _describe_head(layout, "<u1" if self._planes(layout) == 1 else "<u2")

    def _round_kept(
        self, entries: Entries, layout: Layout, one: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ascending ranks and their levels, [N, K]; the highest has a level of its own."""
        ranks, ids, logits = sort_ids(entries.ids, entries.logits, layout)
        codes = self._round(logits - one)
        best = logits == logits.max(axis=1, keepdims=True)
        top = np.where(best, ids, layout.num_classes).argmin(axis=1)[:, None]
        highest = np.maximum(np.take_along_axis(codes, top, axis=1), 1)
        codes = np.minimum(codes, highest - 1)
        np.put_along_axis(codes, top, highest, axis=1)
        return ranks, codes

    def _round(self, log_probs: np.ndarray) -> np.ndarray:
        """The level whose log-probability is nearest, int32."""
        levels = self._log_probs
        root = np.exp(np.minimum(log_probs, 0.0) * 0.25) * self.levels
        # Half way between the logarithms of n and n + 1 the square is n (n + 1).
        upper = _BELOW - 1 + np.rint(np.sqrt(root * root + 0.25))
        lower = _BELOW + np.rint((log_probs - levels[_BELOW]) * (1 / _BELOW_STEP))
        codes = np.where(log_probs < levels[_BELOW], lower, upper)
        rounded: np.ndarray = np.clip(codes, 0, len(levels) - 1).astype(np.int32)
        return rounded

    def _fill_normalisers(
        self, head: np.ndarray, entries: Entries, layout: Layout, codes: np.ndarray
    ) -> None:
        one = entries.logsumexp[:, layout.temperatures.index(1.0)]
        for index, temperature in enumerate(layout.temperatures):
            lse = entries.logsumexp[:, index].astype(np.float64)
            if layout.top_k:
                true = _log_sum_exp(entries.logits / temperature)
                lse += _log_sum_exp(self._log_probs[codes] / temperature) - true
            else:
                lse -= one / temperature
            name = f"logsumexp_{index}"
            if name in (head.dtype.names or ()):
                limits = np.iinfo(head.dtype[name])
                # Rounded up, so that no rounding takes the last of the tail.
                head[name] = np.ceil(lse / _step_at(temperature)).clip(limits.min, limits.max)


@cache
def _describe_head(layout: Layout, floor: str) -> np.dtype[np.void]:
    """The record that there is one of in each target, little endian and packed."""
    fields = [("floor", floor)] if layout.top_k else []
    for index, temperature in enumerate(layout.temperatures):
        if layout.top_k or temperature != 1.0:
            # Above T = 1 it lies in [0, log V], below it has no such bound.
            fields.append((f"logsumexp_{index}", "<i2" if temperature >= 1 else "<i4"))
    return np.dtype([*fields, ("label", "<u2")])


def _unpack(packed: Array, kind: np.dtype[np.void]) -> dict[str, Array]:
    """Fields of [N, bytes] uint8 records, [N] each."""
    if isinstance(packed, np.ndarray):
        record = packed.view(kind)[:, 0]
        return {name: record[name] for name in kind.names or ()}
    fields: dict[str, Array] = {}
    for name, (dtype, start, *_) in (kind.fields or {}).items():
        part = packed[:, start : start + dtype.itemsize].clone(memory_format=_PACKED)
        signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        whole = part.view(signed)[:, 0]
        fields[name] = whole.to(torch.int32) & 0xFFFF if dtype == np.uint16 else whole
    return fields


def _scale(values: Array, step: float, out: Array) -> None:
    out[...] = values
    out *= step


def _read_normaliser(head: np.ndarray, layout: Layout, temperature: float) -> np.ndarray:
    name = f"logsumexp_{layout.temperatures.index(temperature)}"
    if name not in (head.dtype.names or ()):
        return np.zeros(len(head), dtype=np.float32)
    return head[name].astype(np.float32) * np.float32(_step_at(temperature))


@cache
def _list_log_probs(levels: int) -> np.ndarray:
    """The log-probability of each level, ascending."""
    roots = 4 * np.log(np.arange(1, levels + 1) / levels)
    below = roots[0] - _BELOW_STEP * np.arange(_BELOW, 0, -1)
    return np.concatenate([below, roots]).astype(np.float32)


@cache
def _place_log_probs(levels: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_list_log_probs(levels)).to(device)


@cache
def _pair_log_probs(levels: int) -> Tensor:
    """[65536] int64: the bits of the log-probabilities of two levels, the first the lower."""
    low, high = np.arange(2**16) & 255, np.arange(2**16) >> 8
    single = _list_log_probs(levels)
    both = np.stack([single.take(low, mode="clip"), single.take(high, mode="clip")], axis=1)
    return torch.from_numpy(both.view(np.int64)[:, 0].copy())


def _step_at(temperature: float) -> float:
    return _ONE_STEP if temperature == 1.0 else _OTHER_STEP


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=1, keepdims=True)
    total: np.ndarray = np.log(np.exp(values - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    return total
