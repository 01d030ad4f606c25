"""LLaVA-NeXT (AnyRes): thumbnail, then the unpadded canvas of crops row by row, each row closed by a newline."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.families.anyres import anyres, single_view
from foveate.adapters.families.llava import LlavaAdapter
from foveate.pruners.core import Layout


class LlavaNextAdapter(LlavaAdapter):
    """``LlavaNextForConditionalGeneration``."""

    family = "llava_next"
    classes: ClassVar = ("LlavaNextForConditionalGeneration", "LlavaNextModel")

    centre_crop = False  # thumbnail and canvas show the whole picture

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
        return anyres(height, width, pinpoints, config.vision_config.image_size, self.side, limit)

    def _limit(self, call: dict[str, Any]) -> int | None:
        """The canvas is shrunk to this many views' worth of tokens; None = never."""
        return None
