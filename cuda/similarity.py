"""Launches of ``similarity.cu``: cosines of all pairs of tokens, in tiles. Inputs ``(B, N, C)`` of any float dtype."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.launch import TYPES, launch, pointer, rows

_FILE = "similarity.cu"
_TILE = 128  # tokens on a side
_SHARED = 2 * 2 * _TILE * (128 + 16)
_PAIRS = np.dtype(
    [
        *((name, np.uint64) for name in ("a", "b")),
        *((name, np.int64) for name in ("a_batch", "a_row", "b_batch", "b_row")),
        *((name, np.uint64) for name in ("a_inverse", "b_inverse", "b_valid", "out", "partial")),
        *((name, np.int32) for name in ("a_rows", "b_rows", "depth")),
        *((name, np.float32) for name in ("margin", "alpha")),
        ("jump", np.int32),
    ],
    align=True,
)


def inverse_norms(x: Tensor) -> Tensor:
    """``1 / max(|x|, 1e-12)`` of rows ``x`` as :func:`rows` gives them: ``(B, N)`` float32."""
    batch, count, depth = x.shape
    inverse = x.new_empty(batch, count, dtype=torch.float32)
    args = (x, np.int64(x.stride(0)), np.int64(x.stride(1)), np.int32(count), np.int32(depth), inverse)
    launch(_FILE, f"inverse_norms<{TYPES[x.dtype]}>", (-(-count // 8), batch, 1), 256, args, device=x.device)
    return inverse


def gram(x: Tensor, inverse: Tensor, *, write: bool = True) -> tuple[Tensor | None, Tensor]:
    """Cosines ``(B, N, N)`` of ``x`` (None if not to be written) and, tile by tile, the largest with another token
    ``(B, tiles, N)``."""
    batch, count, _ = x.shape
    cosines = x.new_empty(batch, count, count, dtype=torch.float32) if write else None
    return cosines, _similarity("GRAM", torch.float32, x, x, inverse, inverse, out=cosines)


def energy(x: Tensor, margin: float, alpha: float, jump: bool) -> Tensor:
    """Mean of ``f(cos)`` over all tokens: ``(B, N)``."""
    x = rows(x)
    inverse = inverse_norms(x)
    sums = _similarity("ENERGY", torch.float32, x, x, inverse, inverse, margin=margin, alpha=alpha, jump=jump)
    return sums.sum(dim=1) / x.shape[1]


def match(sources: Tensor, targets: Tensor, target_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Best cosine and its column: ``(B, S)`` float32, ``(B, S)`` int64."""
    if sources.dtype != targets.dtype:
        sources, targets = sources.float(), targets.float()
    sources, targets = rows(sources), rows(targets)
    if target_valid is not None:
        target_valid = target_valid.bool().contiguous()
    inverses = inverse_norms(sources), inverse_norms(targets)
    keys = _similarity("MATCH", torch.int64, sources, targets, *inverses, valid=target_valid).amax(dim=1)
    # the score's bits stand above, ordered as integers; below them the column, lower ones higher
    bits = keys >> 32
    score = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).int().view(torch.float32)
    return score, 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _similarity(
    mode: str,
    dtype: torch.dtype,
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    *,
    valid: Tensor | None = None,
    out: Tensor | None = None,
    margin: float = 0.0,
    alpha: float = 0.0,
    jump: bool = False,
) -> Tensor:
    """What every tile of columns says about every row: ``(B, tiles, N)`` of ``dtype``."""
    (batch, count, depth), columns = a.shape, b.shape[1]
    tiles = -(-columns // _TILE)
    partial = a.new_empty(batch, tiles, count, dtype=dtype)
    pairs = np.array(
        (
            *map(pointer, (a, b)),
            *(*a.stride()[:2], *b.stride()[:2]),
            *map(pointer, (a_inverse, b_inverse, valid, out, partial)),
            *(count, columns, depth, margin, alpha, jump),
        ),
        dtype=_PAIRS,
    )
    grid = (tiles, -(-count // _TILE), batch)
    launch(_FILE, f"similarity<{TYPES[a.dtype]}, {mode}>", grid, 256, (pairs,), shared=_SHARED, device=a.device)
    return partial
