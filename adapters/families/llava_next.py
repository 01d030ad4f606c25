"""LLaVA-NeXT (AnyRes): thumbnail, then the unpadded canvas of crops row by row, each row closed by a newline."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.families.llava import LlavaAdapter
from foveate.pruners.core import Layout, Newline, View


class LlavaNextAdapter(LlavaAdapter):
    """``LlavaNextForConditionalGeneration``."""

    family = "llava_next"
    classes: ClassVar = ("LlavaNextForConditionalGeneration", "LlavaNextModel")

    @property
    def centre_crop(self) -> bool:
        return False  # thumbnail and canvas show the whole picture

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        sizes, cropped, limit = self._sizes(call), self._cropped(call), self._limit(call)
        return [self._layout(*size, crops, limit) for size, crops in zip(sizes, cropped, strict=True)]

    def patch_pixels(self, pixels: Tensor, layouts: list[Layout], kind: str, call: dict[str, Any]) -> list[Tensor]:
        if kind == "image" and pixels.ndim == 5:  # pictures of fewer views are filled up
            pixels = torch.cat([views[: len(layout.views)] for views, layout in zip(pixels, layouts)])
        return super().patch_pixels(pixels, layouts, kind, call)

    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        """The model's own packing, run on the values: unpadding and resizing follow by construction."""
        views = values.float().split([len(layout.views) for layout in layouts])
        separator = values.new_zeros(values.shape[-1], dtype=torch.float32)
        packed = self.pack(views, call, separator)
        return [x[layout.places(x.device)] for x, layout in zip(packed, layouts)]

    def pack(self, views: tuple[Tensor, ...], call: dict[str, Any], separator: Tensor) -> list[Tensor]:
        """``[(V, n, C)] -> [(length, C)]``, as the model lays out image features."""
        strategy = call["vision_feature_select_strategy"] or self.inner.config.vision_feature_select_strategy
        sizes = call["image_sizes"]
        return compat.packed(self.inner, views, sizes, separator, vision_feature_select_strategy=strategy)

    @staticmethod
    def _sizes(call: dict[str, Any]) -> list[tuple[int, int]]:
        sizes = call["image_sizes"]
        return [tuple(size) for size in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]

    def _cropped(self, call: dict[str, Any]) -> list[bool]:
        """For every image whether it was cut into crops."""
        return [True] * len(call["image_sizes"])

    def _layout(self, height: int, width: int, crops: bool, limit: int | None) -> Layout:
        config = self.inner.config
        pinpoints = tuple(tuple(p) for p in config.image_grid_pinpoints)
        if not crops:
            return single_view(self.side)
        return _anyres(height, width, pinpoints, config.vision_config.image_size, self.side, limit)

    def _limit(self, call: dict[str, Any]) -> int | None:
        """The canvas is shrunk to this many views' worth of tokens; None = never."""
        return None


def single_view(side: int) -> Layout:
    """One view and a newline."""
    size = side * side
    return Layout((View(side, side),), (Newline(size, 0, size),))


@lru_cache(maxsize=256)
def _anyres(
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
    """Which of ``size`` rows (drawn from ``extent`` canvas rows behind ``first``) belong to each crop of ``side`` rows."""
    crop = [min(crops - 1, int((first + (i + 0.5) * extent / size) // side)) for i in range(size)]
    edges = [sum(c < k for c in crop) for k in range(crops + 1)]
    return list(itertools.pairwise(edges))
