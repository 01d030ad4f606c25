"""Bring a frame's grid of tokens to another size: the five assigners that QuoTA (arXiv 2503.08689) compares.

``PLANS[name](frames, cells)`` looks at ``frames (M, rows, cols, D)`` and returns a function that brings any
``(M, rows, cols, C)`` to ``(M, cells, C)`` the same way, in float32. So what belongs to the tokens, DeepStack levels
for instance, can follow them. ``cells`` is a grid ``(h, w)`` for the assigners that make one (:data:`GRID`), else a
number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

Resample = Callable[[Tensor], Tensor]


def bilinear(frames: Tensor, cells: tuple[int, int]) -> Resample:
    """Bilinear interpolation between the four nearest tokens, corners not aligned, no antialiasing; upsamples too."""
    return lambda x: _rastered(interpolate(_picture(x), cells, mode="bilinear", align_corners=False))


def adaptive_avg(frames: Tensor, cells: tuple[int, int]) -> Resample:
    """Mean of the tokens that a cell covers, wholly or in part."""
    return lambda x: _rastered(adaptive_avg_pool2d(_picture(x), cells))


def linspace(frames: Tensor, cells: int) -> Resample:
    """Tokens at even steps in raster order, untouched."""
    rows, cols = frames.shape[1:3]
    where = linspace_index(rows * cols, cells).to(frames.device)
    return lambda x: x.flatten(1, 2)[:, where].float()


def tome(frames: Tensor, cells: int) -> Resample:
    """Rounds of ToMe's bipartite matching until ``cells`` tokens are left, in the order in which the last round left them."""
    rounds = matching_rounds(frames.flatten(1, 2), cells)
    return lambda x: merged(x.flatten(1, 2), rounds)


def separable_tome(frames: Tensor, cells: tuple[int, int]) -> Resample:
    """ToMe inside every row, then inside every column of what that leaves."""
    h, w = cells
    count = len(frames)
    by_row = matching_rounds(frames.flatten(0, 1), w)
    narrow = merged(frames.flatten(0, 1), by_row).unflatten(0, (count, -1))  # (M, rows, w, D)
    by_column = matching_rounds(narrow.transpose(1, 2).flatten(0, 1), h)

    def apply(x: Tensor) -> Tensor:
        narrow = merged(x.flatten(0, 1), by_row).unflatten(0, (count, -1))
        columns = merged(narrow.transpose(1, 2).flatten(0, 1), by_column).unflatten(0, (count, -1))  # (M, w, h, C)
        return columns.transpose(1, 2).flatten(1, 2)

    return apply


PLANS: dict[str, Callable[[Tensor, Any], Resample]] = {
    "bilinear": bilinear,
    "adaptive_avg": adaptive_avg,
    "linspace": linspace,
    "tome": tome,
    "separable_tome": separable_tome,
}
GRID = ("bilinear", "adaptive_avg", "separable_tome")
"""Assigners that make a grid of cells; the others make an exact number of tokens."""
MERGING = ("tome", "separable_tome")
"""Assigners that cannot enlarge a frame."""


def linspace_index(n: int, k: int) -> Tensor:
    """``trunc`` of k even steps from 0 to n - 1, in float32 as the authors take them: ``(k,)`` int64."""
    return torch.linspace(0, n - 1, k).long()


def pooled(frames: Tensor) -> Tensor:
    """The 2 x 2 bilinear pooling of the LLaVA video models: ``(M, rows, cols, D)`` -> ``(M, ceil(rows/2), ceil(cols/2), D)``."""
    half = tuple(-(-side // 2) for side in frames.shape[1:3])
    return bilinear(frames, half)(frames).unflatten(1, half)


@dataclass(frozen=True)
class Round:
    """One round of bipartite matching, tokens at even places (A) against those at odd places (B).

    Attributes:
        stay: ``(M, a - r)`` the A that stay, by falling similarity; go: ``(M, r)`` those that are merged, as numbers
            among the A.
        into: ``(M, r)`` the B that each of those joins.
    """

    stay: Tensor
    go: Tensor
    into: Tensor


def matching_rounds(x: Tensor, k: int) -> list[Round]:
    """The rounds that bring ``x (M, n, D)`` to ``k`` tokens; none where n <= k."""
    rounds = []
    while x.shape[1] > k:
        metric = normalize(x.float(), dim=-1)
        best, partner = (metric[:, ::2] @ metric[:, 1::2].mT).max(dim=-1)  # (M, a)
        order = best.argsort(dim=-1, descending=True, stable=True)
        r = min(x.shape[1] - k, x.shape[1] // 2)
        go, stay = order[:, :r], order[:, r:]
        rounds.append(Round(stay, go, partner.gather(1, go)))
        x = merged(x, rounds[-1:])
    return rounds


def merged(x: Tensor, rounds: list[Round]) -> Tensor:
    """``x (M, n, C)`` after the rounds, float32. A token is the plain mean of those that join it in one round."""
    x = x.float()
    for round_ in rounds:
        even, odd = x[:, ::2], x[:, 1::2]
        into = round_.into[..., None].expand(-1, -1, x.shape[-1])
        joined = odd.scatter_reduce(1, into, _rows(even, round_.go), "mean", include_self=True)
        x = torch.cat([_rows(even, round_.stay), joined], dim=1)
    return x


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _picture(x: Tensor) -> Tensor:
    return x.float().permute(0, 3, 1, 2)


def _rastered(picture: Tensor) -> Tensor:
    return picture.flatten(2).mT
