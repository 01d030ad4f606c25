"""Bring a frame's grid of tokens to another size: the five assigners that QuoTA (arXiv 2503.08689) compares.

``PLANS[name](frames, cells)`` looks at ``frames (M, rows, cols, D)`` and returns a function that brings any
``(M, rows, cols, C)`` to ``(M, cells, C)`` the same way, in float32. So what belongs to the tokens, DeepStack levels
for instance, can follow them. ``cells`` is a grid ``(h, w)`` for the assigners that make one (:data:`GRID`), else a
number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from foveate.cuda import merge_tokens
from foveate.pruners.core.allocation import frame_grid
from foveate.pruners.core.lattice import host_slots, middles
from foveate.pruners.core.matching import bipartite
from foveate.pruners.core.merging import Groups
from foveate.pruners.core.tokens import Layout, Selection, View

Resample = Callable[[Tensor], Tensor]
Cells = tuple[int, int] | int


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
    """Rounds of ToMe's bipartite matching until ``cells`` tokens are left, in the order of the last round."""
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
    """The 2 x 2 bilinear pooling of the LLaVA video models, ``(M, rows, cols, D)``; halves are rounded up."""
    half = tuple(-(-side // 2) for side in frames.shape[1:3])
    return bilinear(frames, half)(frames).unflatten(1, half)


def matching_rounds(x: Tensor, k: int) -> list[Groups]:
    """The rounds of bipartite matching that bring ``x (M, n, D)`` to ``k`` tokens; none where n <= k."""
    rounds: list[Groups] = []
    while x.shape[1] > k:
        rounds.append(bipartite(x.float(), min(x.shape[1] - k, x.shape[1] // 2), ascending=False))
        x = merged(x, rounds[-1:])
    return rounds


def merged(x: Tensor, rounds: list[Groups]) -> Tensor:
    """``x (M, n, C)`` after the rounds, float32. A token is the plain mean of those that join it in one round."""
    x = x.float()
    for groups in rounds:
        x, _ = merge_tokens(x, groups.keep, groups.source, groups.target)
    return x


def _picture(x: Tensor) -> Tensor:
    return x.float().permute(0, 3, 1, 2)


def _rastered(picture: Tensor) -> Tensor:
    return picture.flatten(2).mT


def resampled(
    layout: Layout, frames: Sequence[Tensor], shares: Sequence[int], assigner: str, limited: bool = True
) -> Selection:
    """Bring the views' ``(rows, cols, D)`` to their shares: the selection of one image, a batch of one.

    A cell takes the place of the token under its centre. Frames that grew beyond their own places push into their
    neighbours', in order, which only sequences with compact positions can bear.
    """
    device = frames[0].device
    groups: dict[tuple[torch.Size, Cells], list[int]] = {}
    targets = []
    for v, (view, frame, share) in enumerate(zip(layout.views, frames, shares)):
        if share > 0:
            rows, cols = frame.shape[:2]
            share = min(share, rows * cols) if assigner in MERGING else share
            cells = frame_grid(share, (rows, cols), limited or assigner in MERGING) if assigner in GRID else share
            groups.setdefault((frame.shape, cells), []).append(v)
            targets.append(view.tokens()[_targets(view, cells, assigner)])
    plans = [
        (members, PLANS[assigner](torch.stack([frames[v] for v in members]), cells))
        for (_, cells), members in groups.items()
    ]
    target, entry = torch.cat(targets).sort(stable=True)  # views of a canvas share its rows

    def follow(frames: Sequence[Tensor]) -> Tensor:
        made = {}
        for members, plan in plans:
            made |= dict(zip(members, plan(torch.stack([frames[v] for v in members]))))
        return torch.cat([made[v] for v in sorted(made)])[entry.to(device)]

    def resample(x: Tensor) -> Tensor:
        return follow([x[view.tokens(x.device)].unflatten(0, view.grid) for view in layout.views])

    index = distinct_places(target, layout.size).to(device)
    return Selection(index[None], follow(frames)[None], resample=[resample])


def distinct_places(targets: Tensor, n: int) -> Tensor:
    """Ascending, unique places among ``n`` as near as may be to ``targets (K,)``, which ascend: ``(K,)`` int64."""
    number = torch.arange(len(targets))
    return torch.minimum((targets - number).cummax(0).values + number, n - len(targets) + number)


def _targets(view: View, cells: Cells, assigner: str) -> Tensor:
    """Places in the view's raster where its cells would sit."""
    if assigner == "linspace":
        return linspace_index(view.size, cells)
    if isinstance(cells, tuple):
        if cells[0] <= view.rows and cells[1] <= view.cols:
            return host_slots(view.grid, cells)
        cells = cells[0] * cells[1]
    return middles(view.size, cells)
