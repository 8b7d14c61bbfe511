"""What a teacher said, and what a loss sees of it.

    Targets (raw logits of the kept classes, logsumexp per temperature) -- at(T) -->
    SparseDistribution

A softmax at temperature T needs the logits and one number more, logsumexp(z/T) over *all* classes.
With that number stored per temperature, each kept probability and the mass that was cut off are
exact at every cached temperature. At any other they cannot be recovered from a truncated record, so
it is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError

UNLABELLED = -100  # the label id of a target without a label, as everywhere in PyTorch
_NOTHING = -100.0  # log-probability of a group without classes, finite for every loss
_TENSORS = (
    "ids",
    "logits",
    "draw_ids",
    "draw_logits",
    "logsumexp",
    "label_ids",
    "label_log_probs",
)


@dataclass(frozen=True)
class SparseDistribution:
    """The teacher's distribution over V classes at one temperature, at N positions.

    Attributes:
        ids: [N, K] int64, distinct within a row, in no promised order.
        log_probs: [N, K] float32, exact log p of the kept ids (-inf for padding of a short row).
        tail_mass: [N] float32, 1 - sum p over the kept ids; exactly 0 where every class is kept.
        draw_ids: [N, R] int64, drawn with replacement from p(T=1) restricted to what was not kept.
        draw_log_probs: [N, R] float32, log p of the drawn ids at this temperature.
        draw_weights: [N, R] float32, sum_j weight_j f(draw_j) is an unbiased estimate of
            sum over the tail of p_i f(i).
        num_classes: V.
    """

    ids: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    draw_ids: Tensor
    draw_log_probs: Tensor
    draw_weights: Tensor
    num_classes: int

    def entropy(self) -> Tensor:
        """[N] nats: exact where every class is kept, unbiased where there are draws, else a lower
        bound, because no class of the tail is more probable than the least of the kept ones."""
        kept = _surprise(self.log_probs.exp(), self.log_probs)
        if self.ids.shape[1] == self.num_classes:
            return kept
        if self.draw_ids.shape[1]:
            return kept + _surprise(self.draw_weights, self.draw_log_probs)
        present = self.log_probs > -torch.inf
        least = torch.where(present, self.log_probs, 0.0).amin(dim=1)
        return kept - self.tail_mass * least


@dataclass(frozen=True)
class Targets:
    """The teacher's knowledge at N positions, as it is cached.

    Attributes:
        ids: [N, K] int64, or int32 as a cache gives them: half the bytes to copy and to move to a
            device, where `at` widens them. The kept classes, distinct within a row, in no promised
            order.
        logits: [N, K] float32, their raw logits (temperature 1, before any softmax); -inf for
            padding of a short row, whose id means nothing.
        draw_ids: [N, R] like ids, drawn with replacement from the softmax restricted to the
            classes that were not kept.
        draw_logits: [N, R] float32, their raw logits.
        logsumexp: [N, len(temperatures)] float32, log sum_i exp(z_i / T) over all V classes.
        label_ids: [N] int64, UNLABELLED (-100) where there is none.
        label_log_probs: [N] float32, the teacher's log-probability of the label at T = 1, 0 where
            there is none.
        temperatures: the cached temperatures, ascending; 1.0 is always one of them.
        num_classes: V.
        grouped: [N, K, len(temperatures)] float32, the log-probabilities themselves where classes
            are sums of others (`regroup`), of which no logit gives more than one temperature.
    """

    ids: Tensor
    logits: Tensor
    draw_ids: Tensor
    draw_logits: Tensor
    logsumexp: Tensor
    label_ids: Tensor
    label_log_probs: Tensor
    temperatures: tuple[float, ...]
    num_classes: int
    grouped: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        if self.grouped is not None:
            changed["grouped"] = function(self.grouped)
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> "Targets":
        """Copy every tensor to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, index: Tensor | slice) -> "Targets":
        """Keep some of the N positions: a slice, a boolean mask or indices."""
        return self._map(lambda tensor: tensor[index])

    @staticmethod
    def cat(parts: Sequence["Targets"]) -> "Targets":
        """Join positions of several examples of one cache."""
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS
        }
        if any(part.grouped is not None for part in parts):
            joined["grouped"] = torch.cat([part._every_temperature() for part in parts])
        return replace(parts[0], **joined)

    def regroup(self, groups: Tensor) -> "Targets":
        """Add up the probabilities of classes that fall together, at each cached temperature.

        Where every class is kept the result is exact, and what falls nowhere is left out of a
        distribution that is scaled up to 1. Of a truncated record what was kept is moved, the mass
        that was cut off stays cut off, and what falls nowhere joins it.

        Args:
            groups: [N, V] int64, the new class of each class at each position, in [0, V), or -1.

        Raises:
            ConfigError: there are draws, which stand for single classes.
        """
        if self.draw_ids.shape[1]:
            raise ConfigError(
                "targets: draws stand for single classes and cannot be added up; cache the teacher"
                " with targets.tail_draws 0"
            )
        kept = groups.gather(1, self.ids.long())
        place = torch.where(kept < 0, self.num_classes, kept)[..., None]
        probs = self._every_temperature().double().exp()
        dense = probs.new_zeros(len(self), self.num_classes + 1, len(self.temperatures))
        dense = dense.scatter_add(1, place.expand_as(probs), probs)[:, :-1]
        at_one = self.temperatures.index(1.0)
        ids = dense[..., at_one].topk(self.ids.shape[1], dim=1).indices
        log_probs = dense.gather(1, ids[..., None].expand_as(probs)).log()
        if self.ids.shape[1] == self.num_classes:
            log_probs = (log_probs - log_probs.logsumexp(dim=1, keepdim=True)).clamp(min=_NOTHING)
        grouped = log_probs.float()
        return replace(
            self,
            ids=ids.to(self.ids.dtype),
            logits=grouped[..., at_one],
            logsumexp=torch.zeros_like(self.logsumexp),
            grouped=grouped,
        )

    def _every_temperature(self) -> Tensor:
        """Log-probabilities of the kept classes, [N, K, len(temperatures)]."""
        if self.grouped is not None:
            return self.grouped
        return torch.stack([self.at(t).log_probs for t in self.temperatures], dim=-1)

    def first_choice(self) -> tuple[Tensor, Tensor]:
        """The teacher's first choice, [N] int64 ids and [N] logits; that of the draws where nothing
        was kept."""
        kept = self.ids.shape[1] > 0
        ids, logits = (self.ids, self.logits) if kept else (self.draw_ids, self.draw_logits)
        logit, column = logits.max(dim=1)
        return ids.gather(1, column[:, None])[:, 0].long(), logit

    def confidence(self) -> Tensor:
        """The probability of the first choice at T = 1, [N]."""
        return torch.exp(self.first_choice()[1] - self._logsumexp(1.0)[:, 0])

    def at(self, temperature: float) -> SparseDistribution:
        """The distribution softmax(z / temperature), exact on the kept ids.

        Raises:
            ConfigError: the temperature was not cached.
        """
        log_probs = self.logits / temperature - self._logsumexp(temperature)
        if self.grouped is not None:
            log_probs = self.grouped[..., self.temperatures.index(temperature)]
        if self.ids.shape[1] == self.num_classes:  # no rounding may invent mass that was cut off
            log_probs = torch.log_softmax(
                self.logits / temperature if self.grouped is None else log_probs, dim=-1
            )
            tail_mass = log_probs.new_zeros(len(self))
        else:
            tail_mass = _tail_mass(log_probs)
        draw_log_probs = self.draw_logits / temperature - self._logsumexp(temperature)
        return SparseDistribution(
            ids=self.ids.long(),
            log_probs=log_probs,
            tail_mass=tail_mass,
            draw_ids=self.draw_ids.long(),
            draw_log_probs=draw_log_probs,
            draw_weights=self._draw_weights(draw_log_probs),
            num_classes=self.num_classes,
        )

    def _logsumexp(self, temperature: float) -> Tensor:
        if temperature not in self.temperatures:
            cached = ", ".join(f"{t:g}" for t in self.temperatures)
            raise ConfigError(
                f"temperature {temperature:g}: the cache holds exact targets at {cached} only;"
                f" use one of these, or add {temperature:g} to targets.temperatures and cache the"
                " teacher again"
            )
        column = self.temperatures.index(temperature)
        return self.logsumexp[:, column : column + 1]

    def _draw_weights(self, draw_log_probs: Tensor) -> Tensor:
        """(m_1 / R) p_T(j) / p_1(j): draws come from the tail at T = 1, whatever T is asked for."""
        draws = self.draw_ids.shape[1]
        at_one = self._logsumexp(1.0)
        tail_mass = _tail_mass(self.logits - at_one)
        ratio = torch.exp(draw_log_probs - (self.draw_logits - at_one))
        return tail_mass[:, None] / max(draws, 1) * ratio


def _tail_mass(log_probs: Tensor) -> Tensor:
    return (1.0 - log_probs.exp().sum(dim=-1)).clamp(min=0.0)


def _surprise(weights: Tensor, log_probs: Tensor) -> Tensor:
    """- sum w log p over the last dimension, where p = 0 adds nothing."""
    return -(weights * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=1)
