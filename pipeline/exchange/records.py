"""Records of a dump to cached examples, or one line about why a record is no such thing.

    Record -- require_sound --> Sound: dense rows, counted in Findings -- keep(K) --> CachedExample

The mass that a dump does not carry is the tail; where its entries add up to more than 1, by what
their rounding costs, they are divided by their sum. What a row lacks of K entries is padding: ids
that the row does not hold, with a logit of -inf.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.cache import TargetsSpec
from pipeline.errors import DataError
from pipeline.examples import CachedExample, Column, Example
from pipeline.exchange.dump import ABSENT, Draws, Record
from pipeline.targets import UNLABELLED, Targets

_SLACK = 1e-3  # nats above 0 that a log-probability may be rounded to
_EXCESS = 1.1  # sum that no rounding explains
_EXACT = 1e-5  # mass that float32 may lose of a row that adds up to 1
_LEAST = -100.0  # log-probability of a label that nothing is known of but that it is rare
_ENOUGH = 16  # rows that can tell whether they belong to their tokens


@dataclass
class Findings:
    """What was seen of all records.

    Attributes:
        targets, labels: how many; labels_kept: labels among the entries of their row.
        labels_bounded: labels of which is known only that they are no more probable than that.
        least, most: entries of a row.
        tailless: rows whose probabilities add up to 1.
        scaled: rows whose probabilities added up to more, by at most `excess`.
        unnamed: entries that have no id.
        unanswered: texts without a target.
    """

    targets: int = 0
    labels: int = 0
    labels_kept: int = 0
    labels_bounded: int = 0
    least: int = 2**31
    most: int = 0
    tailless: int = 0
    scaled: int = 0
    excess: float = 0.0
    unnamed: int = 0
    unanswered: int = 0

    def describe(self) -> dict[str, Any]:
        """JSON values; counts of 0 are left out."""
        found = {n: v for n, v in vars(self).items() if v and n not in ("least", "most", "excess")}
        found["entries"] = [min(self.least, self.most), self.most]
        return found | ({"excess": float(f"{self.excess:.2g}")} if self.scaled else {})


@dataclass(frozen=True)
class Sound:
    """A record that may be kept.

    Attributes:
        example: its tokens and labels.
        ids: [N, W] int64, the most probable first.
        log_probs: [N, W] float64, -inf for padding.
        label_log_probs: [N] float64, 0 where there is no label.
        draws: see `Record`.
    """

    example: Example
    ids: np.ndarray
    log_probs: np.ndarray
    label_log_probs: np.ndarray
    draws: Draws | None

    def keep(
        self, spec: TargetsSpec, num_classes: int, columns: Mapping[str, Column]
    ) -> CachedExample:
        """What a cache holds of it."""
        ids, log_probs = _fit(self.ids, self.log_probs, int(spec.top_k))
        empty = np.zeros((len(ids), 0))
        draws = self.draws or Draws(np.zeros((len(ids), 1)), empty.astype(np.int64), empty)
        # A text without targets does not tell how wide its rows would be.
        logsumexp, draw_ids, draw_log_probs = (
            torch.from_numpy(rows.reshape(len(ids), width))
            for rows, width in (
                (draws.logsumexp, len(spec.temperatures)),
                (draws.ids, spec.tail_draws),
                (draws.log_probs, spec.tail_draws),
            )
        )
        one = logsumexp[:, spec.temperatures.index(1.0), None].float()
        targets = Targets(
            ids=torch.from_numpy(ids),
            logits=torch.from_numpy(log_probs).float() + one,
            draw_ids=draw_ids,
            draw_logits=draw_log_probs.float() + one,
            logsumexp=logsumexp.float(),
            label_ids=torch.from_numpy(self.example.label_ids.astype(np.int64)),
            label_log_probs=torch.from_numpy(self.label_log_probs).float(),
            temperatures=spec.temperatures,
            num_classes=num_classes,
        )
        return CachedExample(**vars(replace(self.example, columns=columns)), targets=targets)


@dataclass(frozen=True)
class Space:
    """What ids a dump may hold.

    Attributes:
        num_classes: V; tokens: of the tokenizer.
        shifted: see `Draft`.
    """

    num_classes: int
    tokens: int
    shifted: bool = True


def require_sound(record: Record, space: Space, findings: Findings) -> Sound:
    """Check a record and make its rows dense.

    Raises:
        DataError: it holds something that is no distribution, or belongs to another text.
    """
    _require_tokens(record, space)
    ids, log_probs = _densify(record)
    _require_entries(ids, log_probs, space.num_classes)
    hits = (ids == record.label_ids[:, None]) & (log_probs > -np.inf)
    if space.shifted:
        _require_alignment(record, ids, log_probs > -np.inf)
    log_probs = _require_mass(log_probs, findings)
    said = _judge_labels(record, log_probs, hits, findings)
    counts = (log_probs > -np.inf).sum(axis=1)
    findings.targets += len(ids)
    findings.least = min(findings.least, int(counts.min(initial=findings.least)))
    findings.most = max(findings.most, int(counts.max(initial=0)))
    findings.unnamed += record.unnamed
    findings.unanswered += not len(ids)
    example = Example(
        example_id=str(record.example_id),
        input_ids=record.input_ids.astype(np.int32),
        segment_lengths=record.segment_lengths.astype(np.int32),
        target_positions=record.positions.astype(np.int32),
        label_ids=record.label_ids.astype(np.int32),
    )
    return Sound(example, ids, log_probs, said, record.draws)


def _require_tokens(record: Record, space: Space) -> None:
    ids, positions, tokens = record.input_ids, record.positions, space.tokens
    if not len(ids):
        raise DataError("holds no tokens; leave it out")
    if ids.min() < 0 or ids.max() >= tokens:
        found = int(ids.max() if ids.max() >= tokens else ids.min())
        raise DataError(
            f"holds token {found:,}, the tokenizer has {tokens:,}; give the tokenizer that the dump"
            " was made with"
        )
    if int(record.segment_lengths.sum()) != len(ids) or (record.segment_lengths < 0).any():
        raise DataError(f"its documents do not make up its {len(ids)} tokens")
    inside = not len(positions) or not space.shifted or positions[-1] < len(ids)
    if (
        not inside
        or (positions < 0).any()
        or (np.diff(positions) <= 0).any()
        or len(record.label_ids) != len(positions)
    ):
        raise DataError(f"its rows are not at ascending positions of its {len(ids)} tokens")


def _densify(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """[N, W] ids and log-probabilities, by falling probability, of equals the smaller id first."""
    lengths = record.ids.lengths
    if len(lengths) != len(record.positions) or not np.array_equal(
        lengths, record.log_probs.lengths
    ):
        raise DataError(
            f"has {len(record.positions)} positions, {len(lengths)} rows of ids and"
            f" {len(record.log_probs.lengths)} of log-probabilities, or rows of different lengths"
        )
    if np.isnan(record.log_probs.values).any():
        raise DataError("holds log-probabilities that are NaN; leave it out, or make it again")
    width = int(lengths.max(initial=1))
    filled = np.arange(width) < lengths[:, None]
    ids = np.full(filled.shape, -1, dtype=np.int64)
    log_probs = np.full(filled.shape, -np.inf)
    ids[filled], log_probs[filled] = record.ids.values, record.log_probs.values
    log_probs[log_probs <= ABSENT] = -np.inf
    order = np.lexsort((ids, -log_probs), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(log_probs, order, axis=1)


def _require_entries(ids: np.ndarray, log_probs: np.ndarray, num_classes: int) -> None:
    present = log_probs > -np.inf
    empty = np.flatnonzero(~present.any(axis=1))
    if len(empty):
        raise DataError(f"row {empty[0]} holds no entry with a probability")
    if log_probs.max(initial=0.0) > _SLACK:
        raise DataError(
            f"holds a log-probability of {log_probs.max():.4g}, expected at most 0: natural"
            " logarithms of probabilities, not logits"
        )
    outside = present & ((ids < 0) | (ids >= num_classes))
    if outside.any():
        raise DataError(
            f"holds an entry of class {int(ids[outside][0]):,}, the tokenizer has"
            f" {num_classes:,}; give the tokenizer that the dump was made with"
        )
    ordered = np.sort(np.where(present, ids, -1 - np.arange(ids.shape[1])), axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(twice):
        raise DataError(f"row {twice[0]} holds a class twice")


def _require_alignment(record: Record, ids: np.ndarray, present: np.ndarray) -> None:
    """Refuse rows that keep the token beside theirs far more often than their own."""
    tokens = record.input_ids
    shifts = {}
    for shift in (0, 1, 2):
        place = record.positions + shift
        rows = (place < len(tokens)) & (record.label_ids != UNLABELLED)
        kept = (ids[rows] == tokens[place[rows]][:, None]) & present[rows]
        shifts[shift] = (int(rows.sum()), float(kept.any(axis=1).mean()) if rows.any() else 0.0)
    (_, before), (count, own), (_, after) = (shifts[s] for s in (0, 1, 2))
    other, where = max((before, "before"), (after, "after"))
    if count >= _ENOUGH and own < 0.5 * other and other - own > 0.25:
        raise DataError(
            f"its rows do not belong to its tokens: {100 * own:.0f} % of {count} hold the token"
            f" that they are about, {100 * other:.0f} % the one {where} it; shift them by one"
        )


def _require_mass(log_probs: np.ndarray, findings: Findings) -> np.ndarray:
    """The rows, divided by their sum where it is above 1."""
    mass = np.exp(log_probs).sum(axis=1)
    if mass.max(initial=0.0) > _EXCESS:
        raise DataError(
            f"probabilities of row {int(mass.argmax())} add up to {mass.max():.4g}, expected at"
            " most 1: natural logarithms, after a softmax over all classes"
        )
    over = mass > 1.0 + _EXACT
    findings.tailless += int((mass >= 1.0 - _EXACT).sum())
    findings.scaled += int(over.sum())
    findings.excess = max(findings.excess, float(mass.max(initial=1.0)) - 1.0)
    scaled: np.ndarray = np.minimum(log_probs - np.log(np.where(over, mass, 1.0))[:, None], 0.0)
    return scaled


def _judge_labels(
    record: Record, log_probs: np.ndarray, hits: np.ndarray, findings: Findings
) -> np.ndarray:
    """[N] log-probabilities of the labels: as told, as kept, or the most that they can be."""
    labelled = record.label_ids != UNLABELLED
    kept = np.where(hits, log_probs, -np.inf).max(axis=1, initial=-np.inf)
    tail = np.maximum(1.0 - np.exp(log_probs).sum(axis=1), 0.0)
    least = np.where(log_probs > -np.inf, log_probs, 0.0).min(axis=1, initial=0.0)
    with np.errstate(divide="ignore"):
        bound = np.maximum(np.minimum(np.log(tail), least), _LEAST)
    told = np.full(len(hits), np.nan)
    if record.label_log_probs is not None:
        told = np.minimum(record.label_log_probs, 0.0)
    known = hits.any(axis=1) | ~np.isnan(told)
    findings.labels += int(labelled.sum())
    findings.labels_kept += int((labelled & hits.any(axis=1)).sum())
    findings.labels_bounded += int((labelled & ~known).sum())
    said: np.ndarray = np.where(np.isnan(told), np.where(hits.any(axis=1), kept, bound), told)
    said[~labelled] = 0.0
    return said


def _fit(ids: np.ndarray, log_probs: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first K entries; where there are fewer, the smallest classes that are not there."""
    ids, log_probs = ids[:, :top_k], log_probs[:, :top_k]
    missing = np.full((len(ids), top_k - ids.shape[1]), -1, dtype=np.int64)
    ids = np.concatenate([ids, missing], axis=1)
    log_probs = np.concatenate([log_probs, np.full(missing.shape, -np.inf)], axis=1)
    for row in np.flatnonzero((log_probs == -np.inf).any(axis=1)):
        absent = log_probs[row] == -np.inf
        others = np.setdiff1d(np.arange(top_k), ids[row][~absent])
        ids[row, absent] = others[: absent.sum()]
    return ids, log_probs
