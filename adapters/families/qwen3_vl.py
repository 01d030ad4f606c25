"""Qwen3-VL: as Qwen2-VL, with DeepStack features and timestamps between video frames."""

from __future__ import annotations

import itertools
from typing import ClassVar

from foveate.adapters.families.qwen2_vl import Qwen2VLAdapter

_DIGITS = 4  # a video's first timestamp has at most so many tokens more than its second


class Qwen3VLAdapter(Qwen2VLAdapter):
    """``Qwen3VLForConditionalGeneration``: DeepStack features of early tower blocks join after early decoder layers."""

    family = "qwen3_vl"
    classes: ClassVar = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")
    pixel_mean: ClassVar = (0.5, 0.5, 0.5)
    pixel_std: ClassVar = (0.5, 0.5, 0.5)
    writes_frame_text: ClassVar[bool] = True

    def frame_text(self, ids: list[int], frames: list[tuple[int, int]]) -> list[list[int]]:
        """``<1.5 seconds><|vision_start|> … <|vision_end|>``; the timestamp is any text between two frames.

        That of the first frame is told from the prompt before it by how the second one's begins and ends; where it does
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
    """Bounds of the timestamp that ends before place ``stop`` and has the first and last token of ``like``; empty if
    none.
    """
    if like and stop > 0 and ids[stop - 1] == like[-1]:
        for start in range(stop - 1, max(stop - len(like) - _DIGITS, 0) - 1, -1):
            if ids[start] == like[0]:
                return start, stop
    return stop, stop
