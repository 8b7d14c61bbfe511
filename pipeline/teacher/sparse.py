"""Dense logits in, `Targets` out: top-k, tail draws, one logsumexp per temperature, the label.

    logits [N, V] -- top_entries --> kept ids and logits -- log_sum_exps, draw_tail --> Targets

Everything is computed in float32 on the device of the logits. Both searches go over about sqrt(V)
groups of classes first and inside the chosen groups only afterwards; that changes their cost, not
their result. A row with a NaN or infinite logit comes back with a NaN logsumexp, so that whoever
knows the examples can name one without waiting for the device here.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.targets import UNLABELLED, Targets


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
    N, V = z.shape
    K = resolve_top_k(top_k, V, tail_draws)
    values, ids = top_entries(z, min(K + 1, V))  # one more than kept: the peak of the tail
    draw_ids, known = ids.new_empty(N, 0), {}
    if tail_draws:
        draw_ids, tail = draw_tail(z, ids[:, :K], values[:, K:], tail_draws, generator)
        known[1.0] = torch.logaddexp(tail, values[:, :K].logsumexp(dim=1))
    logsumexp = log_sum_exps(z, values[:, :1], temperatures, known)
    logsumexp.masked_fill_(~z.amin(dim=1, keepdim=True).isfinite(), torch.nan)
    label_logits = z.gather(1, label_ids.clamp(min=0)[:, None])[:, 0]
    label_log_probs = label_logits - logsumexp[:, list(temperatures).index(1.0)]
    return Targets(
        ids=ids[:, :K].contiguous(),
        logits=values[:, :K].contiguous(),
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
        top = z.topk(count, dim=1)
        return top.values, top.indices
    groups = V // width
    maxima = z[:, : width * groups].view(N, width, groups).amax(dim=1)
    chosen = maxima.topk(count, dim=1, sorted=False).indices
    steps = torch.arange(0, width * groups, groups, device=z.device)
    rest = torch.arange(width * groups, V, device=z.device).expand(N, -1)
    candidates = torch.cat([(chosen[:, :, None] + steps).flatten(1), rest], dim=1)
    top = z.gather(1, candidates).topk(count, dim=1)
    return top.values, candidates.gather(1, top.indices)


def log_sum_exps(
    z: Tensor, peak: Tensor, temperatures: Sequence[float], known: Mapping[float, Tensor]
) -> Tensor:
    """log sum_i exp(z_i / T) per temperature, [N, len(temperatures)].

    Args:
        z: [N, V] float32.
        peak: [N, 1], the largest of each row, subtracted before the exponential.
        temperatures: T > 0.
        known: temperature -> [N], what need not be computed again.
    """
    scratch = torch.empty_like(z)
    found, held = dict(known), 0.0  # held: the temperature of the exponentials in scratch
    for temperature in sorted(set(temperatures) - set(known), reverse=True):
        if held == 2.0 * temperature:
            scratch.square_()  # a third of the cost of an exponential
        else:
            torch.sub(z, peak, out=scratch).mul_(1.0 / temperature).exp_()
        held = temperature
        found[temperature] = scratch.sum(dim=1).log() + peak[:, 0] / temperature
    return torch.stack([found[temperature] for temperature in temperatures], dim=1)


def draw_tail(
    z: Tensor, kept: Tensor, peak: Tensor, draws: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw ids with replacement from softmax(z) restricted to what is not kept.

    A group is drawn by its mass, then a class within it, each by inverting a cumulative sum in
    float64: no class is too rare to be drawn, and none of the kept can be.

    Args:
        z: [N, V] float32.
        kept: [N, K], ids left out.
        peak: [N, 1], the largest logit that is not kept; with it as the origin the tail never
            underflows as a whole.
        draws: number of draws per row.
        generator: on the device of z.

    Returns:
        The ids, [N, draws] int64, and log sum exp(z) over what is not kept, [N].
    """
    N, V = z.shape
    width = isqrt(V)
    groups = -(-V // width)
    weights = z.new_empty(N, width * groups)
    weights[:, V:] = 0.0  # no class
    torch.sub(z, peak, out=weights[:, :V]).exp_().scatter_(1, kept, 0.0)
    grid = weights.view(N, width, groups)
    uniform = torch.rand((2, N, draws), dtype=torch.float64, device=z.device, generator=generator)
    sums = grid.sum(dim=1)
    group = _invert(sums, uniform[0])
    members = grid.gather(2, group[:, None, :].expand(N, width, draws)).transpose(1, 2)
    member = _invert(members, uniform[1][:, :, None])[:, :, 0]
    drawn = (member * groups + group).clamp(max=V - 1)  # beyond V only where weights are NaN
    return drawn, sums.sum(dim=1).log() + peak[:, 0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform * total, along the last dimension."""
    cumulative = weights.double().cumsum(dim=-1)
    level = uniform * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, level, right=True)
    return index.clamp(max=weights.shape[-1] - 1)  # only where the weights are NaN
