"""Rows of a token sequence: gathered with gaps and markers, averaged over runs."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(
    x: Tensor, index: Tensor, *, marked: Tensor | None = None, marker: Tensor | float | None = None
) -> Tensor:
    """Rows ``index (B, K)`` of ``x (B, N, …)``: ``(B, K, …)`` of x's dtype, bit for bit.

    Args:
        index: -1 gives a row of zeros.
        marked: ``(B, K)`` bool, rows that become ``marker``: a number, one row ``(…)``, or one for each, ``(B, K, …)``.
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    taken = x[rows, index.clamp(min=0)]
    shape = (*index.shape, *[1] * (x.ndim - 2))
    taken = taken.masked_fill((index < 0).view(shape), 0)
    if marked is None:
        return taken
    return torch.where(marked.view(shape), torch.as_tensor(marker, dtype=x.dtype, device=x.device), taken)


def run_mean(x: Tensor, run: Tensor, count: int) -> Tensor:
    """Mean of the rows of each run: ``x (B, N, D)``, ``run (B, N)`` int64, -1 outside of any: ``(B, count, D)`` float32."""
    inside = (run >= 0)[..., None]
    where = run.clamp(min=0)[..., None].expand_as(x)
    total = x.new_zeros(len(x), max(count, 1), x.shape[2], dtype=torch.float32)
    total = total.scatter_add(1, where, torch.where(inside, x.float(), 0.0))
    size = total.new_zeros(len(x), max(count, 1), 1).scatter_add(1, where[..., :1], inside.float())
    return (total / size.clamp(min=1))[:, :count]
