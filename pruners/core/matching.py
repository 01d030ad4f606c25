"""Which tokens merge with which: the matchings of ToMe (arXiv 2210.09461) and PiToMe (arXiv 2405.16148)."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.cuda import best_match
from foveate.cuda.merging import take_rows
from foveate.pruners.core.merging import Groups
from foveate.pruners.core.selection import ranked


def bipartite(metric: Tensor, r: int, *, prefix: int = 0, ascending: bool = True) -> Groups:
    """Bipartite soft matching of ``metric (B, N, d)``: even rows against odd ones, the ``r`` best pairs merge.

    ``prefix`` rows stay first. After them come the even rows that stay (ascending, or by falling similarity), then all
    odd rows. ``r`` is at most half of the other rows.
    """
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    score, match = best_match(metric[:, even::2], metric[:, odd::2])
    order = ranked(score)
    target = match.gather(1, order[:, :r])
    order = order.mul_(2).add_(even)  # as rows of the metric
    source, stay = order[:, :r], order[:, r:]
    if ascending or prefix:
        stay = stay.sort(dim=1).values
    rows = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
    keep = torch.cat([rows[:, :prefix], stay, rows[:, odd::2]], dim=1)
    return Groups(keep, source, target + (prefix + stay.shape[1]))


def kth(metric: Tensor, k: int, *, prefix: int = 0) -> Groups:
    """Of every ``k`` consecutive rows after the prefix, the first k - 1 merge into their best match among the k-th
    ones.

    ``metric (B, N, d)``; the last N mod k rows, which the official code loses, stay as they are.
    """
    rows = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
    whole = (metric.shape[1] - prefix) // k * k
    periods = rows[:, prefix : prefix + whole].unflatten(1, (-1, k))
    source, last = periods[..., :-1].flatten(1), periods[..., -1]
    _, match = best_match(metric[:, source[0]], metric[:, last[0]])
    return Groups(torch.cat([rows[:, :prefix], last, rows[:, prefix + whole :]], dim=1), source, prefix + match)


def random_groups(
    metric: Tensor, r: int, generator: torch.Generator, *, prefix: int = 0, pairs: bool = False
) -> Groups:
    """``r`` random rows of ``metric (B, N, d)`` merge into their best match among the others, or random ``pairs``."""
    batch, n, _ = metric.shape
    shuffled = prefix + torch.randperm(n - prefix, generator=generator).to(metric.device)
    source, stay = shuffled[:r], shuffled[r:].sort().values
    if pairs:
        match = torch.randint(len(stay), (r,), generator=generator).to(metric.device).expand(batch, -1)
    else:
        _, match = best_match(metric[:, source], metric[:, stay])
    keep = torch.cat([torch.arange(prefix, device=metric.device), stay])
    return Groups(keep.expand(batch, -1), source.expand(batch, -1), prefix + match)


def protected_matching(metric: Tensor, energy: Tensor, r: int, *, prefix: int = 0) -> Groups:
    """The 2r patches of highest energy are paired, all others protected (variant "pitome").

    ``metric (B, N, d)`` with ``energy (B, N - prefix)`` of its patches; r at most half of them. Rows leave as prefix,
    protected, targets, by falling energy.
    """
    order = prefix + ranked(energy)
    source, targets, protected = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    paired = take_rows(metric, order[:, : 2 * r])
    _, match = best_match(paired[:, 0::2], paired[:, 1::2])
    keep = torch.cat([_prefix(metric, prefix), protected, targets], dim=1)
    return Groups(keep, source, prefix + protected.shape[1] + match)


def energy_matching(metric: Tensor, energy: Tensor, r: int, *, prefix: int = 0) -> Groups:
    """All patches are split along the energy ranking, and the ``r`` best pairs merge (variant "bsm_pitome").

    Rows leave as prefix, unmerged sources by falling similarity, targets by falling energy.
    """
    order = prefix + ranked(energy)
    sources, targets = order[:, 0::2], order[:, 1::2]
    by_rank = take_rows(metric, order)
    score, match = best_match(by_rank[:, 0::2], by_rank[:, 1::2])
    best = ranked(score)
    sources = sources.gather(1, best)
    source, stay = sources[:, :r], sources[:, r:]
    keep = torch.cat([_prefix(metric, prefix), stay, targets], dim=1)
    return Groups(keep, source, prefix + stay.shape[1] + match.gather(1, best[:, :r]))


def _prefix(metric: Tensor, prefix: int) -> Tensor:
    return torch.arange(prefix, device=metric.device).expand(len(metric), -1)
