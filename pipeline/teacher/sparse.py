"""Dense logits in, `Targets` out: top-k, tail draws, one logsumexp per temperature, the label.

    logits [N, V] -- top_entries --> kept ids and logits
                  -- read_tail, without the kept --> draws, logsumexp per temperature --> Targets

Everything is computed in float32 on the device of the logits. Both searches go over about sqrt(V)
groups of classes first and inside the chosen groups only afterwards; that changes their cost, not
their result. A row with a NaN or infinite logit comes back with a NaN logsumexp, so that whoever
knows the examples can name one without waiting for the device here.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.targets import UNLABELLED, Targets

_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign


def resolve_top_k(top_k: int | Literal["all"], num_classes: int, tail_draws: int = 0) -> int:
    """Turn `top_k` into a count of kept classes.

    Raises:
        ConfigError: it is above the class count, or draws are asked for where no tail is left.
    """
    kept = num_classes if top_k == "all" else top_k
    if kept > num_classes:
        raise ConfigError(
            f"targets.top_k: {kept} is above the class count, {num_classes}; use at most"
            f" {num_classes}, or all"
        )
    if tail_draws and kept == num_classes:
        raise ConfigError(
            f"targets.tail_draws: {tail_draws} draws have no tail to come from, because top_k"
            f" keeps all {num_classes} classes; set tail_draws to 0"
        )
    return kept


def sparse_targets(
    logits: Tensor,
    top_k: int | Literal["all"],
    tail_draws: int,
    temperatures: Sequence[float],
    label_ids: Tensor,
    generator: torch.Generator | None = None,
) -> Targets:
    """Keep the `top_k` largest logits and an unbiased sample of the rest, exact normalisers beside.

    Args:
        logits: [N, V], any float dtype; not changed.
        top_k: kept classes K, or "all".
        tail_draws: R, drawn with replacement from softmax(logits) restricted to what is not kept.
        temperatures: ascending, 1.0 among them.
        label_ids: [N] int64, UNLABELLED (-100) where there is none.
        generator: of the draws, on the device of the logits.

    Returns:
        Targets on the device of the logits, the kept ids in descending order of their logits. The
        logsumexp of a row with a NaN or infinite logit is NaN.

    Raises:
        ConfigError: see `resolve_top_k`.
    """
    z = logits.float()
    V = z.shape[1]
    K = resolve_top_k(top_k, V, tail_draws)
    values, ids = top_entries(z, min(K + 1, V))  # one more than kept: the peak of the tail
    kept, kept_ids = values[:, :K].contiguous(), ids[:, :K].contiguous()
    logsumexp = torch.stack([(kept / t).logsumexp(dim=1) for t in temperatures], dim=1)
    draw_ids = ids[:, :0]
    if K < V:
        draw_ids, rest = read_tail(z, kept_ids, values[:, K:], temperatures, tail_draws, generator)
        logsumexp = torch.logaddexp(logsumexp, rest)
    logsumexp.masked_fill_(~z.sum(dim=1, keepdim=True).isfinite(), torch.nan)
    label_logits = z.gather(1, label_ids.clamp(min=0)[:, None])[:, 0]
    label_log_probs = label_logits - logsumexp[:, list(temperatures).index(1.0)]
    return Targets(
        ids=kept_ids,
        logits=kept,
        draw_ids=draw_ids,
        draw_logits=z.gather(1, draw_ids),
        logsumexp=logsumexp,
        label_ids=label_ids,
        label_log_probs=label_log_probs.masked_fill(label_ids == UNLABELLED, 0.0),
        temperatures=tuple(temperatures),
        num_classes=V,
    )


def top_entries(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of [N, V], descending: values and ids, [N, count] each.

    The largest entries lie in the groups with the largest maxima, so only the classes of `count`
    groups are compared one by one.
    """
    N, V = z.shape
    width = isqrt(V // count)  # classes per group; balances the two searches
    if width < 3:
        ids = find_largest(z, count)
        return z.gather(1, ids), ids
    groups = V // width
    maxima = z[:, : width * groups].view(N, width, groups).amax(dim=1)
    chosen = find_largest(maxima, count, in_order=False)
    steps = torch.arange(0, width * groups, groups, device=z.device)
    rest = torch.arange(width * groups, V, device=z.device).expand(N, -1)
    candidates = torch.cat([(chosen[:, :, None] + steps).flatten(1), rest], dim=1)
    ids = candidates.gather(1, find_largest(z.gather(1, candidates), count))
    return z.gather(1, ids), ids


def find_largest(values: Tensor, count: int, in_order: bool = True) -> Tensor:
    """Where the `count` largest of each row of [N, n] float32 stand, [N, count] int64.

    On a CPU a value and its place become one integer, whose partition NumPy vectorises: a third of
    the time of `topk`. Of equal values the first are taken there, and come first.

    Args:
        values: no promise is made for rows with a NaN.
        count: at most n.
        in_order: whether the largest must come first; otherwise in any order.
    """
    if values.device.type != "cpu":
        return values.topk(count, dim=1, sorted=in_order).indices
    N, n = values.shape
    bits = values.contiguous().view(torch.int32)
    keys = torch.empty(N, n, 2, dtype=torch.int32)  # low word, high word of an int64
    keys[:, :, 0] = torch.arange(n - 1, -1, -1, dtype=torch.int32)
    torch.bitwise_xor(bits, (bits >> 31).bitwise_and_(_MAGNITUDE), out=keys[:, :, 1])
    ordered = keys.numpy().view(np.int64)[:, :, 0]
    ordered.partition(n - count, axis=1)
    largest = ordered[:, n - count :]
    if in_order:
        largest = np.sort(largest, axis=1)[:, ::-1]
    return torch.from_numpy(n - 1 - (largest & 0xFFFFFFFF))


def read_tail(
    z: Tensor,
    kept: Tensor,
    peak: Tensor,
    temperatures: Sequence[float],
    draws: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """What is not kept: classes drawn from its softmax, and its logsumexp per temperature.

    A group is drawn by its mass, then a class within it, each by inverting a cumulative sum in
    float64: no class is too rare to be drawn, and none of the kept can be. The highest temperature
    comes first, and half of it costs a square instead of an exponential.

    Args:
        z: [N, V] float32.
        kept: [N, K], ids left out.
        peak: [N, 1], the largest logit that is not kept; with it as the origin the tail never
            underflows as a whole.
        temperatures: T > 0, 1.0 among them.
        draws: R, number of draws per row.
        generator: on the device of z.

    Returns:
        The ids, [N, R] int64, and log sum exp(z / T) over what is not kept, [N, temperatures].
    """
    N, V = z.shape
    width = isqrt(V)
    groups = -(-V // width)
    padded = z.new_empty(N, width * groups)
    padded[:, V:] = 0.0  # no class
    weights, grid = padded[:, :V], padded.view(N, width, groups)
    drawn = kept.new_empty(N, 0)
    found, held = {}, 0.0  # held: the temperature of the weights
    for temperature in sorted(temperatures, reverse=True):
        if held == 2.0 * temperature:
            weights.mul_(weights)
        else:
            torch.sub(z, peak, out=weights)
            if temperature != 1.0:
                weights.mul_(1.0 / temperature)
            weights.exp_().scatter_(1, kept, 0.0)
        held = temperature
        sums = grid.sum(dim=1)
        found[temperature] = sums.sum(dim=1).log() + peak[:, 0] / temperature
        if draws and temperature == 1.0:
            drawn = _draw(grid, sums, draws, generator)
    # beyond V only where weights are NaN
    return drawn.clamp(max=V - 1), torch.stack([found[t] for t in temperatures], dim=1)


def _draw(grid: Tensor, sums: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Columns drawn by their sums [N, groups], then rows by the weights [N, width, groups]."""
    N, width, groups = grid.shape
    uniform = torch.rand(
        (2, N, draws), dtype=torch.float64, device=grid.device, generator=generator
    )
    group = _invert(sums, uniform[0])
    members = grid.gather(2, group[:, None, :].expand(N, width, draws)).transpose(1, 2)
    member = _invert(members, uniform[1][:, :, None])[:, :, 0]
    return member * groups + group


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform * total, along the last dimension."""
    cumulative = weights.double().cumsum(dim=-1)
    level = uniform * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, level, right=True)
    return index.clamp(max=weights.shape[-1] - 1)  # only where the weights are NaN
