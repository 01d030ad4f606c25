"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: any resolution, packed tower, 2 x 2 patches merged into one token, m-RoPE."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.families.base import Adapter, Modality
from foveate.adapters.taps import PackedTap, Values
from foveate.pruners.core import Layout, ModelInfo, Signal

_DIGITS = 4  # a video's first timestamp has at most so many tokens more than its second


class Qwen2VLAdapter(Adapter):
    """``Qwen2VLForConditionalGeneration``."""

    family = "qwen2_vl"
    classes: ClassVar = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
    patch_dims: ClassVar[int] = 1

    @property
    def tower(self) -> nn.Module:
        return self.inner.visual

    @property
    def modalities(self) -> tuple[Modality, ...]:
        config = self.inner.config
        return (
            Modality("image", compat.IMAGE_ENCODER, "pixel_values", config.image_token_id),
            Modality("video", compat.VIDEO_ENCODER, "pixel_values_videos", config.video_token_id),
        )

    def describe(self) -> ModelInfo:
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
            patch_size=self.inner.config.vision_config.patch_size,
            frames_per_view=self.inner.config.vision_config.temporal_patch_size,
        )

    def full_attention(self) -> tuple[int, ...] | None:
        """Blocks whose attention is not windowed; None = all."""
        return None

    def tap(self, signals: Iterable[Signal], values: Callable[[], Values | None]) -> PackedTap:
        return PackedTap(self.tower.blocks, self.tower.spatial_merge_size**2, signals, values)

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        merge = self.tower.spatial_merge_size
        return [_layout(t, h // merge, w // merge) for t, h, w in call[f"{kind}_grid_thw"].tolist()]

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


class Qwen25VLAdapter(Qwen2VLAdapter):
    """``Qwen2_5_VLForConditionalGeneration``: most blocks attend inside windows, units run in window order."""

    family = "qwen2_5_vl"
    classes: ClassVar = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")

    def full_attention(self) -> tuple[int, ...]:
        return tuple(self.tower.fullatt_block_indexes)

    def raster(self, grid_thw: Tensor) -> Tensor:
        return torch.argsort(compat.window_order(self.tower, grid_thw).to(grid_thw.device))


class Qwen3VLAdapter(Qwen2VLAdapter):
    """``Qwen3VLForConditionalGeneration``: DeepStack features of early tower blocks join behind early decoder layers."""

    family = "qwen3_vl"
    classes: ClassVar = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")
    pixel_mean: ClassVar = (0.5, 0.5, 0.5)
    pixel_std: ClassVar = (0.5, 0.5, 0.5)
    writes_frame_text: ClassVar[bool] = True

    def frame_text(self, ids: list[int], frames: list[tuple[int, int]]) -> list[list[int]]:
        """``<1.5 seconds><|vision_start|> … <|vision_end|>``; the timestamp is any text between two frames.

        That of the first frame is told from the prompt in front of it by how the second one's begins and ends; where it does
        not look alike, it stays.
        """
        config = self.inner.config
        bounds = []
        for first, last in frames:
            start = first - (first > 0 and ids[first - 1] == config.vision_start_token_id)
            stop = last + 1 + (last + 1 < len(ids) and ids[last + 1] == config.vision_end_token_id)
            bounds.append((start, stop))
        stamps = [(before[1], after[0]) for before, after in itertools.pairwise(bounds)]
        stamps.insert(0, _stamp_before(ids, bounds[0][0], ids[slice(*stamps[0])] if stamps else []))
        return [
            [*range(stamp[0], first), *range(last + 1, stop)]
            for stamp, (first, last), (_, stop) in zip(stamps, frames, bounds)
        ]


def _stamp_before(ids: list[int], stop: int, like: list[int]) -> tuple[int, int]:
    """Bounds of the timestamp that ends in front of place ``stop`` and has the first and last token of ``like``; empty if none."""
    if like and stop > 0 and ids[stop - 1] == like[-1]:
        for start in range(stop - 1, max(stop - len(like) - _DIGITS, 0) - 1, -1):
            if ids[start] == like[0]:
                return start, stop
    return stop, stop


def _layout(frames: int, rows: int, cols: int) -> Layout:
    return Layout.grid(rows, cols) if frames == 1 else Layout.video(frames, rows, cols)
