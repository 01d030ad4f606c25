"""Qwen2-VL: any resolution, packed tower, 2 x 2 patches merged into one token, m-RoPE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.families.base import Adapter, Modality
from foveate.adapters.taps import PackedTap, Values
from foveate.pruners.core import Layout, ModelInfo, Signal


class Qwen2VLAdapter(Adapter):
    """``Qwen2VLForConditionalGeneration``."""

    family = "qwen2_vl"
    classes: ClassVar = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
    packed = True

    def describe(self) -> ModelInfo:
        config, vision, self.tower = self.inner.config, self.inner.config.vision_config, self.inner.visual
        self.modalities = (
            Modality("image", compat.IMAGE_ENCODER, "pixel_values", config.image_token_id),
            Modality("video", compat.VIDEO_ENCODER, "pixel_values_videos", config.video_token_id),
        )
        blocks = len(self.tower.blocks)
        return ModelInfo(
            family=self.family,
            tower=type(self.tower).__name__,
            encoder_layers=blocks,
            feature_layer=blocks - 1,
            class_token=False,
            decoder_layers=len(self.text_model.layers),
            mrope=True,
            full_attention=self.full_attention(),
            patch_size=vision.patch_size,
            frames_per_view=vision.temporal_patch_size,
        )

    def full_attention(self) -> tuple[int, ...] | None:
        """Blocks whose attention is not windowed; None = all."""
        return None

    def tap(self, signals: Iterable[Signal], values: Callable[[], Values | None]) -> PackedTap:
        return PackedTap(self.tower.blocks, signals, values, unit=self.tower.spatial_merge_size**2)

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        merge = self.tower.spatial_merge_size
        return [
            Layout.grid(h // merge, w // merge) if t == 1 else Layout.video(t, h // merge, w // merge)
            for t, h, w in call[f"{kind}_grid_thw"].tolist()
        ]

    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        if "raster" not in call:  # alike for all values of a call
            call["raster"] = self.raster(call[f"{kind}_grid_thw"])
        return list(values[call["raster"]].split([layout.size for layout in layouts]))

    def patch_pixels(self, pixels: Tensor, layouts: list[Layout], kind: str, call: dict[str, Any]) -> list[Tensor]:
        vision, unit = self.inner.config.vision_config, self.tower.spatial_merge_size**2
        shape = (unit, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        units = pixels.view(-1, *shape).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)  # (N, 3, T, unit h, w)
        return list(units.split([layout.size for layout in layouts]))

    def raster(self, grid_thw: Tensor) -> Tensor | slice:
        """Index that brings merge units from tower order to raster order."""
        return slice(None)
