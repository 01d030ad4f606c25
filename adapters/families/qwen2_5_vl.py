"""Qwen2.5-VL: as Qwen2-VL, but most blocks attend inside windows."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.families.qwen2_vl import Qwen2VLAdapter


class Qwen25VLAdapter(Qwen2VLAdapter):
    """``Qwen2_5_VLForConditionalGeneration``: most blocks attend inside windows, units run in window order."""

    family = "qwen2_5_vl"
    classes: ClassVar = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")

    def full_attention(self) -> tuple[int, ...]:
        return tuple(self.tower.fullatt_block_indexes)

    def raster(self, grid_thw: Tensor) -> Tensor:
        return torch.argsort(compat.window_order(self.tower, grid_thw).to(grid_thw.device))
