"""Attention statistics from queries and keys, never holding more than a block of rows of the attention map.

Queries are ``(B, H, Q, d)``, keys ``(B, H_kv, K, d)`` with ``H`` a multiple of ``H_kv`` (grouped-query attention). Inputs
may have any float dtype and strides; arithmetic and results are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 23  # scores held at once: 32 MiB of float32


def received_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, first_query: int = 0, logits: bool = False
) -> Tensor:
    """Attention received by every key: mean over heads and query rows of ``softmax(scale * q k^T)``.

    Args:
        scale: ``1 / sqrt(d)`` if None.
        first_query: leave out the query rows in front of it (class and register tokens); their keys stay in the softmax.
        logits: average ``scale * q k^T`` itself; O(N d), no softmax.

    Returns:
        ``(B, K)`` float32. Cost O(H Q K d) time, O(B H block K) memory.
    """
    scale = _scale(q, scale)
    q = q[:, :, first_query:]
    if logits:
        mean_q = _grouped(q.float().mean(dim=2, keepdim=True), k)
        return (scale * mean_q @ k.float().mT).mean(dim=1).squeeze(1)
    received = q.new_zeros(len(k), k.shape[2], dtype=torch.float32)
    for scores in _score_blocks(q, k, scale):
        received += scores.softmax(dim=-1).sum(dim=(1, 2))
    return received / (q.shape[1] * q.shape[2])


def given_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, first: int = 0, logits: bool = False
) -> Tensor:
    """Attention given by every query row to the keys from ``first`` on: mean over heads and those keys.

    The softmax still runs over all keys. Rows in front of ``first`` are left out.

    Returns:
        ``(B, Q - first)`` float32.
    """
    scale = _scale(q, scale)
    q = q[:, :, first:]
    if logits:
        mean_k = k[:, :, first:].float().mean(dim=2, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return (scale * q.float() @ mean_k.mT).mean(dim=1).squeeze(-1)
    given = [scores.softmax(dim=-1)[..., first:].mean(dim=-1).mean(dim=1) for scores in _score_blocks(q, k, scale)]
    return torch.cat(given, dim=-1)


def class_attention(q: Tensor, k: Tensor, *, scale: float | None = None, row: int = 0) -> Tensor:
    """Attention that query row ``row`` pays to every key, mean over heads: ``(B, K)`` float32. O(H K d)."""
    return next(_score_blocks(q[:, :, row : row + 1], k, _scale(q, scale))).softmax(dim=-1).mean(dim=1).squeeze(1)


def rows_to_columns_attention(
    q: Tensor,
    k: Tensor,
    *,
    row_positions: Tensor,
    row_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention that a few query rows pay to every key under a causal mask, mean over heads and valid rows.

    Args:
        q: ``(B, H, R, d)`` the chosen rows only.
        row_positions: ``(B, R)`` int64, the index of each row among the keys: it sees keys 0 .. position.
        row_valid: ``(B, R)`` bool, rows to average (all if None); key_valid: ``(B, K)`` bool, keys that may be seen.

    Returns:
        ``(B, K)`` float32, zero for a batch item without a valid row. O(H R K d), no K x K map.
    """
    batch, heads, rows, _ = q.shape
    keys = torch.arange(k.shape[2], device=k.device)
    row_valid = row_positions.new_ones(batch, rows, dtype=torch.bool) if row_valid is None else row_valid
    total = q.new_zeros(batch, k.shape[2], dtype=torch.float32)
    done = 0
    for scores in _score_blocks(q, k, _scale(q, scale)):
        block = slice(done, done + scores.shape[2])
        done = block.stop
        seen = keys <= row_positions[:, block, None]  # (B, R, K)
        if key_valid is not None:
            seen = seen & key_valid[:, None]
        # -finfo.min, not -inf: a padding row sees nothing and must give zeros, not NaN
        probs = scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)
        counted = (seen & row_valid[:, block, None])[:, None]
        total += torch.where(counted, probs, 0.0).sum(dim=(1, 2))
    return total / (heads * row_valid.sum(dim=1, keepdim=True).clamp(min=1))


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """Mean of the query heads that share a key head: ``(B, H, Q, d) -> (B, H_kv, Q, d)``."""
    return q.unflatten(1, (k.shape[1], -1)).mean(dim=2)


def _score_blocks(q: Tensor, k: Tensor, scale: float) -> Iterator[Tensor]:
    """``scale * q k^T`` in float32, a block of query rows at a time: ``(B, H, rows, K)``."""
    batch, heads, n_rows, _ = q.shape
    keys = k.float().mT
    shared = heads // k.shape[1]
    if shared > 1:
        keys = keys.repeat_interleave(shared, dim=1)
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * k.shape[2]))
    for start in range(0, n_rows, step):
        yield (q[:, :, start : start + step].float() * scale) @ keys
