"""LLaVA-OneVision: AnyRes for a single picture, one view each for several, pooled frames and one newline for a
video.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.families.base import Encoded, Modality
from foveate.adapters.families.llava_next import LlavaNextAdapter
from foveate.adapters.taps import SplitProjectionTap, Values
from foveate.pruners.core import Layout, ModelInfo, Newline, Signal, UnpooledFrames


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """``LlavaOnevisionForConditionalGeneration``."""

    family = "llava_onevision"
    classes: ClassVar = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")

    def describe(self) -> ModelInfo:
        info = replace(super().describe(), pools_frames=True)
        video = self.inner.config.video_token_id
        self.modalities += (Modality("video", compat.VIDEO_ENCODER, "pixel_values_videos", video),)
        self.project = None  # large canvases and frames are shrunk after the projector
        return info

    def tap(self, signals: Iterable[Signal], values: Callable[[], Values | None]) -> SplitProjectionTap:
        signals = list(signals)
        unpooled = [signal for signal in signals if isinstance(signal, UnpooledFrames)]
        tap = super().tap([signal for signal in signals if signal not in unpooled], values)
        for signal in unpooled:
            tap.keep_output(self.projector, signal)
        return tap

    def encoded(self, kind: str, output: Any, call: dict[str, Any], signals: dict[Signal, Tensor]) -> Encoded | None:
        unpooled = {s: x for s, x in signals.items() if isinstance(s, UnpooledFrames)}  # (videos * frames, n, D)
        encoded = super().encoded(kind, output, call, {s: x for s, x in signals.items() if s not in unpooled})
        if encoded is None:
            return None
        for signal, frames in unpooled.items():
            by_video = list(frames.unflatten(0, (len(encoded.layouts), -1)).flatten(1, 2)) if kind == "video" else None
            encoded.signals[signal] = by_video or encoded.features
        return encoded

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        if kind == "image":
            return super().layouts(kind, call, output)
        videos = getattr(output, compat.FEATURES)  # (videos, length, D)
        pooled = math.ceil(self.side / 2)
        frames = videos.shape[1] // pooled**2  # the newline may still be missing
        layout = Layout.video(frames, pooled, pooled)
        return [Layout(layout.views, (Newline(layout.size, 0, layout.size),))] * len(videos)

    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        if kind == "image":
            return super().arrange(kind, values, layouts, call)
        pooled = compat.pooled_frames(self.inner, values.float())  # (videos * frames, n, C)
        return list(pooled.unflatten(0, (len(layouts), -1)).flatten(1, 2))

    def pack(self, views: tuple[Tensor, ...], call: dict[str, Any], separator: Tensor) -> list[Tensor]:
        return compat.packed(self.inner, views, call["image_sizes"], separator, vision_aspect_ratio=self._aspect(call))

    def _cropped(self, call: dict[str, Any]) -> list[bool]:
        per_sample = call.get("batch_num_images")
        if per_sample is None:
            return super()._cropped(call)
        return [n == 1 for n in per_sample for _ in range(n)]

    def _aspect(self, call: dict[str, Any]) -> str:
        return call.get("vision_aspect_ratio") or self.inner.config.vision_aspect_ratio

    def _limit(self, call: dict[str, Any]) -> int:
        return int(self._aspect(call).removeprefix("anyres_max_"))
