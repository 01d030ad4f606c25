"""Regular lattices on a grid of tokens: their size within a budget, and where their points stand."""

from __future__ import annotations

import torch
from torch import Tensor


def lattice(grid: tuple[int, int], k: int) -> tuple[int, int]:
    """The sub-lattice of at most ``k`` tokens: most tokens, then nearest aspect ratio, then more rows."""
    rows, cols = grid
    sizes = [(r, min(cols, k // r)) for r in range(1, min(rows, k) + 1)]
    return max(sizes, key=lambda size: (size[0] * size[1], -abs(size[0] / size[1] - rows / cols), size[0]))


def lattice_size(grid: tuple[int, int], k: int) -> int:
    """Number of tokens of that lattice, 0 for an empty budget."""
    rows, cols = lattice(grid, k) if k else (0, 0)
    return rows * cols


def middles(n: int, k: int) -> Tensor:
    """``floor((i + 1/2) n / k)`` for i = 0 .. k - 1, ``(k,)`` int64."""
    return (2 * torch.arange(k) + 1) * n // (2 * k)


def host_slots(grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Tokens of a ``grid`` where a ``small`` lattice stands, in raster order: ``(small rows * small cols,)`` int64."""
    (rows, cols), (small_rows, small_cols) = grid, small
    return (middles(rows, small_rows)[:, None] * cols + middles(cols, small_cols)).flatten()


def nearest_host(grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """For every token of ``grid`` the :func:`host_slots` of the nearest bin, ``(rows * cols,)`` int64."""
    row, col = (middles(n, m)[_nearest_bin(n, m)] for n, m in zip(grid, small))
    return (row[:, None] * grid[1] + col).flatten()


def _nearest_bin(n: int, m: int) -> Tensor:
    """Of m bins over n places the one whose centre is nearest to each place, ``(n,)`` int64; it holds the place."""
    places, bins = 2 * torch.arange(n) + 1, 2 * torch.arange(m) + 1
    return (places[:, None] * m - bins * n).abs().argmin(dim=1)
