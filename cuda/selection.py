"""Greedy subset selection. Inputs may have any float dtype; arithmetic is float32, ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

_TINY = 1e-12
_ROUND_OFF = (
    1e-5  # of a determinantal gain, relative to the token's own kernel entry, after hundreds of float32 updates
)


def diverse_subset(features: Tensor, k: int, start: Tensor | None = None, *, objective: str = "max_min") -> Tensor:
    """Greedy diversity by cosine similarity.

    Args:
        features: ``(B, N, D)``; zero rows count as orthogonal to everything.
        k: tokens to pick, 1 <= k <= N.
        start: ``(B,)`` int64 first picks; None takes the most isolated token, whose nearest other token is farthest.
        objective: ``"max_min"`` takes the token farthest from its nearest pick (farthest-first traversal, k-center),
            ``"max_sum"`` the one with the smallest summed similarity to all picks.

    Returns:
        ``(B, k)`` int64 in order of selection, without repetition. O(N^2 D) once, then O(N) per pick.
    """
    x = normalize(features.float(), dim=-1, eps=_TINY)
    gram = x @ x.mT
    rows = torch.arange(len(x), device=x.device)
    if start is None:
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        start = gram.masked_fill(itself, -torch.inf).amax(dim=1).argmin(dim=1)
    picks = [start]
    score = gram[rows, start].clone()
    score[rows, start] = torch.inf
    for _ in range(k - 1):
        pick = score.argmin(dim=1)
        picks.append(pick)
        similarity = gram[rows, pick]
        # a picked token's score is inf, and stays inf under both updates
        score = score + similarity if objective == "max_sum" else torch.maximum(score, similarity)
        score[rows, pick] = torch.inf
    return torch.stack(picks, dim=1)


def conditional_dpp(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Greedy MAP of a determinantal point process with kernel ``r_i (x_i . x_j) r_j`` (CDPruner).

    Args:
        features: ``(B, N, D)``, normalised here; relevance: ``(B, N)`` non-negative.
        k: tokens to pick. Gains within float32 round-off of zero count as zero, and beyond the kernel's rank all are: the
            lowest free indices follow.

    Returns:
        ``(B, k)`` int64 in order of selection, without repetition. O(N^2 D + k^2 N).
    """
    x = normalize(features.float(), dim=-1, eps=_TINY)
    relevance = relevance.float()
    kernel = relevance[:, :, None] * (x @ x.mT) * relevance[:, None]
    batch, n = relevance.shape
    rows = torch.arange(batch, device=x.device)
    # the diagonal free of round-off, which would break the ties of equally relevant tokens
    gain = relevance.square() * x.any(dim=-1)  # (B, N)
    noise = _ROUND_OFF * gain
    taken = torch.zeros_like(gain, dtype=torch.bool)
    factors = kernel.new_zeros(batch, k, n)
    picks = []
    for step in range(k):
        pick = gain.where(gain > noise, 0.0).masked_fill(taken, -torch.inf).argmax(dim=1)
        picks.append(pick)
        taken[rows, pick] = True
        left, adds = gain[rows, pick], (gain > noise)[rows, pick]
        projected = (factors[rows, :step, pick][:, None] @ factors[:, :step]).squeeze(1) if step else 0.0
        factor = (kernel[rows, pick] - projected) / left.where(adds, 1.0).sqrt()[:, None]
        factor = factor.where(adds[:, None], 0.0)
        factors[:, step] = factor
        gain = gain - factor.square()
    return torch.stack(picks, dim=1)
