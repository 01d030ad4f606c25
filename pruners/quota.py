"""QuoTA: every frame of a video gets tokens by how much it helps to answer the question.

Luo, Chen et al., "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension", arXiv
2503.08689 (AAAI 2026). Headline: LLaVA-Video-7B gains 3.2 points on average over six video benchmarks at the same
number of visual tokens. At the decoder's entry, each frame's grid of tokens is resampled to its share of the video's
budget; a frame with a share below one token vanishes. The frames' scores come from outside: ``session.frame_scores``,
which ``foveate.FrameScorer`` makes. Cost: the scorer, one forward pass per frame. Formulas follow the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from foveate.errors import InputError, ParameterError
from foveate.pruners.core import AtEntry, Keep, Layout, ModelInfo, Pruner, Selection, Stage, Tokens, register
from foveate.pruners.core.allocation import CAPS, checked_scores, frame_budgets, frame_weights, scores_per_view
from foveate.pruners.core.parameters import choice, integer, number, parameter
from foveate.pruners.core.resampling import GRID, PLANS, resampled
from foveate.pruners.core.selection import budget, keep_all, split_budget, stacked
from foveate.pruners.core.signals import UnpooledFrames


@register("quota")
@dataclass(frozen=True)
class QuoTA(Pruner):
    """Token shares for the frames of a video by their scores; a picture that is not a video counts as one frame.

    Attributes:
        keep: fraction or number of visual tokens of a video, an upper bound; a full budget changes nothing.
        assigner: how a frame gets to its share: ``"bilinear"`` (published), ``"adaptive_avg"``, ``"linspace"``,
            ``"tome"`` or ``"separable_tome"``.
        cap: what happens to shares above a frame's size. ``"none"`` enlarges the frame, ``"official"`` is the authors'
            single pass, which loses part of the budget, ``"waterfill"`` (recommended) hands the surplus to the others.
            None: as published, ``"none"`` for bilinear, else ``"official"``; on m-RoPE models ``"waterfill"``.
        remainder: ``"drop"`` loses fractions of tokens, as published; ``"largest"`` gives them to the frames with the
            largest. With it, waterfill and linspace or tome, the budget is met exactly.
        min_tokens_per_frame: every frame gets so many at any rate, the rest is shared by the scores.
        score_power: exponent that sharpens the scores.
        score_scale: factor before them, as in the authors' code; it cancels.
        scores: one score >= 0 per frame, for every video alike; None: those of ``session.frame_scores``.
    """

    title: ClassVar[str] = "Tokens per video frame by scores for the question"
    paper: ClassVar[str] = "arXiv 2503.08689 (AAAI 2026)"
    regrids: ClassVar[bool] = True
    cost: ClassVar[str] = "a forward pass of a scoring model per frame, outside; here a few rows read per token"

    keep: Keep = 0.25
    assigner: str = choice("bilinear", *PLANS)
    cap: str | None = choice(None, *CAPS)
    remainder: str = choice("drop", "drop", "largest")
    min_tokens_per_frame: int = integer(0, "number of tokens", 0)
    score_power: float = number(2.0, "power", 0, above=True)
    score_scale: float = number(100.0, "scale", 0, above=True)
    scores: tuple[float, ...] | None = parameter(None, lambda name, scores: tuple(checked_scores(scores).tolist()))

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        published = "none" if self.assigner == "bilinear" else "official"
        cap = self.cap or ("waterfill" if model.mrope else published)
        if model.mrope and cap == "none":
            raise ParameterError(
                f"cap='none' may enlarge a frame beyond its own places, and the three-axis positions of {model.family} "
                "tie tokens to them; use cap='waterfill' or cap='official'"
            )
        # the ToMe assigner alone starts from what the model itself has pooled
        signals = {"unpooled": UnpooledFrames(0)} if model.pools_frames and self.assigner != "tome" else {}
        select = partial(self.select, cap=cap, frames_per_view=model.frames_per_view)
        return (AtEntry(select, signals, reads_frame_scores=True, empty_frames="drop"),)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        exact = self.assigner not in GRID and self.cap == "waterfill" and self.remainder == "largest"
        return budget(self.keep, layout.size) if exact else None

    def select(
        self, tokens: Tokens, unpooled: Tensor | None = None, *, cap: str = "none", frames_per_view: int = 1
    ) -> Selection:
        """Resample the views of every image; ``unpooled (B, V * n, D)``: square frames before the model pooled them."""
        total = budget(self.keep, tokens.count)
        if total >= tokens.count:
            return keep_all(tokens)
        views, device = tokens.layout.views, tokens.embeds.device
        if unpooled is None or views[0].kind != "frame":
            frames = [tokens.embeds[:, view.tokens(device)].unflatten(1, view.grid) for view in views]
        else:
            side = math.isqrt(unpooled.shape[1] // len(views))
            frames = list(unpooled.unflatten(1, (-1, side, side)).unbind(1))
        limited = cap != "none" or views[0].kind != "frame"
        chosen = []
        for b in range(len(tokens.embeds)):
            weights = self._weights(tokens, b, frames_per_view)
            shares = split_budget(total, tokens.layout.sizes)
            if weights is not None:
                size = frames[0].shape[1] * frames[0].shape[2]
                shares = frame_budgets(weights, total, size, cap, self.remainder, self.min_tokens_per_frame)
            one = resampled(tokens.layout, [frame[b] for frame in frames], shares, self.assigner, limited)
            one.values = one.values.to(tokens.embeds.dtype)
            if weights is not None:
                one.scores = torch.from_numpy(weights).float().repeat_interleave(views[0].size).to(device)[None]
            chosen.append(one if unpooled is None else replace(one, resample=None))  # nothing else has that shape
        return stacked(chosen)

    def _weights(self, tokens: Tokens, b: int, frames_per_view: int) -> np.ndarray | None:
        """The frames' weights, None where there is nothing to weigh."""
        views = len(tokens.layout.views)
        if views == 1 or tokens.layout.views[0].kind != "frame":
            return None
        scores = self.scores if tokens.frame_scores is None else tokens.frame_scores[b]
        if scores is None:
            raise InputError(
                f"quota needs scores for the frames of a video that makes {views} views: set session.frame_scores to "
                "one sequence per video before each call (foveate.FrameScorer makes them), or give scores=..."
            )
        shared = scores_per_view(checked_scores(scores), views, frames_per_view)
        return frame_weights(shared, self.score_power, self.score_scale)
