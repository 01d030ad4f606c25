"""AnyRes layouts: a thumbnail, then the unpadded canvas of crops row by row, each row closed by a newline."""

from __future__ import annotations

import itertools
from functools import lru_cache

from torch import Tensor

from foveate.adapters import compat
from foveate.pruners.core import Layout, Newline, View


def single_view(side: int) -> Layout:
    """One view and a newline."""
    size = side * side
    return Layout((View(side, side),), (Newline(size, 0, size),))


@lru_cache(maxsize=256)
def anyres(
    height: int, width: int, pinpoints: tuple[tuple[int, int], ...], image_size: int, side: int, limit: int | None
) -> Layout:
    """Layout of an AnyRes picture of ``height x width`` pixels; crops are cut by what unpadding leaves of them."""
    left, down, across = compat.anyres_canvas(height, width, pinpoints, image_size, side)
    return canvas_layout(left, side, down, across, limit)


def canvas_layout(
    left: Tensor, side: int, down: int, across: int, limit: int | None = None, *, newlines: bool = True
) -> Layout:
    """A thumbnail, and row by row what is ``left`` of a canvas of ``down x across`` crops.

    ``left (rows, cols)`` holds places on the canvas, row-major; ``newlines``: every row is closed by one.
    """
    top, start = divmod(int(left[0, 0]) if left.numel() else 0, across * side)  # a hair-thin picture leaves no row
    rows, cols = left.shape
    tall, wide = rows, cols
    if limit is not None and (ratio := (rows * cols / (limit * side**2)) ** 0.5) > 1.1:
        rows, cols = int(rows // ratio), int(cols // ratio)
    vertical = _bands(top, tall, rows, side, down)
    horizontal = _bands(start, wide, cols, side, across)
    thumbnail = side * side
    views = [View(side, side, kind="thumbnail")]
    views += [
        View(r1 - r0, c1 - c0, start=thumbnail + r0 * cols + c0, stride=cols, kind="crop")
        for r0, r1 in vertical
        for c0, c1 in horizontal
    ]
    ends = tuple(
        Newline(thumbnail + r * (cols + 1) + cols, thumbnail + r * cols, thumbnail + (r + 1) * cols)
        for r in range(rows)
    )
    return Layout(tuple(views), ends if newlines else ())


def _bands(first: int, extent: int, size: int, side: int, crops: int) -> list[tuple[int, int]]:
    """Which of ``size`` rows (drawn from ``extent`` canvas rows after ``first``) belong to each crop of ``side``
    rows.
    """
    crop = [min(crops - 1, int((first + (i + 0.5) * extent / size) // side)) for i in range(size)]
    edges = [sum(c < k for c in crop) for k in range(crops + 1)]
    return list(itertools.pairwise(edges))
