"""Share a video's tokens among its frames by scores, as QuoTA (arXiv 2503.08689) does: on the host, in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from foveate.errors import BudgetError, InputError

Floats = NDArray[np.float64]


def checked_scores(scores: ArrayLike | Tensor) -> Floats:
    """Scores of a video's frames, ``(T,)`` float64.

    Raises:
        InputError: not one number per frame, or a negative one. NaN is left for :func:`frame_weights` to judge.
    """
    try:
        values = np.asarray(scores.detach().cpu().double() if isinstance(scores, Tensor) else scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"frame scores {scores!r}: give one number for each frame of a video") from None
    if values.ndim != 1 or not len(values):
        raise InputError(f"frame scores of shape {values.shape}: give one number for each frame of a video")
    if (values < 0).any() or np.isinf(values).any():
        wrong = int(((values < 0) | np.isinf(values)).argmax())
        raise InputError(f"frame {wrong} has the score {values[wrong]}; scores are probabilities, 0 or more")
    return values


def scores_per_view(scores: Floats, views: int, frames_per_view: int) -> Floats:
    """One score per view: the mean over the ``frames_per_view`` frames that the vision encoder fuses, the last
    repeated.

    Raises:
        InputError: there are neither as many scores as views nor as many as frames.
    """
    if len(scores) == views:
        return scores
    if math.ceil(len(scores) / frames_per_view) != views:
        fused = f", each of {frames_per_view} fused frames" if frames_per_view > 1 else ""
        raise InputError(f"{len(scores)} frame scores for a video of {views} views{fused}; give one per sampled frame")
    padded = np.pad(scores, (0, views * frames_per_view - len(scores)), mode="edge")
    return padded.reshape(views, frames_per_view).mean(axis=1)


def frame_weights(scores: Floats, power: float = 2.0, scale: float = 100.0) -> Floats:
    """Sharpened scores that sum to one, ``(T,)``. All zero, or with a NaN, they weigh alike, with a warning."""
    sharp = (scale * scores) ** power
    total = sharp.sum()
    if not 0 < total < math.inf:
        warnings.warn(f"frame scores sum to {scores.sum()}; all {len(scores)} frames weigh alike", stacklevel=2)
        return np.full(len(scores), 1 / len(scores))
    return sharp / total


def clipped(weights: Floats, cap: float) -> Floats:
    """The authors' cap: one pass in frame order. Where later frames overflow in turn, part of the excess is lost."""
    weights = weights.copy()
    excess = 0.0
    for i, weight in enumerate(weights):
        if weight > cap:
            excess += weight - cap
            weights[i] = cap
    if excess > 0:
        total = weights.sum()
        for i, weight in enumerate(weights):
            if weight < cap:
                weight += weight / total * excess
                if weight > cap:
                    excess += weight - cap
                    weight = cap
                weights[i] = weight
    return weights


def waterfilled(weights: Floats, cap: float) -> Floats:
    """No weight above ``cap``; what is cut off goes to the others in proportion, as often as needed; the sum stays."""
    weights = weights.copy()
    full = np.zeros(len(weights), dtype=bool)
    total = weights.sum()
    while (over := ~full & (weights > cap)).any():
        full |= over
        left = total - cap * full.sum()
        weights[full] = cap
        free = weights[~full]
        if len(free):
            weights[~full] = free / free.sum() * left if free.sum() > 0 else left / len(free)
    return weights


CAPS = {"none": lambda weights, cap: weights, "official": clipped, "waterfill": waterfilled}


def frame_budgets(
    weights: Floats, total: int, size: int, cap: str = "none", remainder: str = "drop", least: int = 0
) -> list[int]:
    """Tokens of every frame, at most ``total`` together.

    Args:
        weights: ``(T,)``, sum at most one.
        size: tokens that a frame has.
        cap: what happens to shares above that, a key of :data:`CAPS`.
        remainder: ``"drop"`` truncates every share, ``"largest"`` then gives what was cut off, a token each, to the
            frames with the largest fractions (earlier first) that ``cap`` lets grow.
        least: tokens that every frame gets at any rate.

    Raises:
        BudgetError: ``least`` tokens for every frame are more than there are.
    """
    frames = len(weights)
    if least * frames > total or least > size:
        raise BudgetError(
            f"min_tokens_per_frame={least}: {frames} frames of {size} tokens share {total} tokens; give a larger budget"
        )
    shared = total - least * frames
    limit = math.inf if cap == "none" else size - least
    if shared and cap != "none":
        weights = CAPS[cap](weights, limit / shared)
    exact = shared * weights
    budgets = np.trunc(exact).astype(int)
    if remainder == "largest":
        spare = min(shared, math.floor(exact.sum() + 1e-6)) - budgets.sum()
        fractions = np.where(budgets < limit, budgets - exact, math.inf)
        growing = [i for i in np.argsort(fractions, kind="stable") if budgets[i] < limit]
        budgets[growing[: max(spare, 0)]] += 1
    budgets = (budgets + least).tolist()
    if not any(budgets):  # a budget smaller than the number of frames, thinly spread: the best frames get a token each
        for i in np.argsort(-weights, kind="stable")[:total]:
            budgets[i] = 1
    return budgets


def frame_grid(share: int, source: tuple[int, int], limited: bool = True) -> tuple[int, int]:
    """Rows and columns, at most ``share`` cells, for a frame of ``source`` rows and columns; ``(0, 0)`` for an empty
    share.

    Square frames: the largest square, or one row more where that fits. Others keep their aspect; ``limited``: not above
    ``source``.
    """
    rows, cols = source
    if share <= 0:
        return 0, 0
    if rows == cols:
        side = math.isqrt(share)
        return (side + 1, side) if side * (side + 1) <= share else (side, side)
    h = min(max(1, round(math.sqrt(share * rows / cols))), share)
    h = min(h, rows) if limited else h
    w = share // h
    return h, min(w, cols) if limited else w


def sampled_frames(duration: float, frames: int, base: int = 96, per_hour: float = 64) -> NDArray[np.int64]:
    """Which frames of a video to look at: ``base`` and ``per_hour`` more for every hour, evenly from the first to the
    last.

    ``duration`` in seconds, ``frames`` in the file. Short videos repeat frames, as the authors' sampler does.
    """
    count = base + int(duration / 3600 * per_hour)
    return np.linspace(0, frames - 1, count).astype(np.int64)


def with_newlines(tokens: Tensor, grids: Sequence[tuple[int, int]], newline: Tensor) -> Tensor:
    """Close every row of every frame's grid with ``newline (D,)``, as LLaVA-Video's own sequence has it.

    ``tokens (sum h * w, D)`` in time and raster order -> ``(sum h * (w + 1), D)``. For code that builds its own
    sequence: the ``transformers`` families put no newline inside a video.
    """
    rows = [w for h, w in grids for _ in range(h)]
    closed = [row for part in tokens.split(rows) for row in (part, newline[None])]
    return torch.cat([tokens[:0], *closed])
