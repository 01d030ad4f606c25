"""Weights, caps, budgets and grids of a video's frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError
from foveate.pruners.core.allocation import (
    CAPS,
    clipped,
    frame_budgets,
    frame_grid,
    frame_weights,
    sampled_frames,
    scores_per_view,
    waterfilled,
    with_newlines,
)

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_weights_are_squared_scores() -> None:
    """Statement: weights are p² / Σ p², whatever the scale."""
    scores = np.array([0.1, 0.3, 0.2])
    np.testing.assert_allclose(frame_weights(scores), scores**2 / (scores**2).sum(), rtol=1e-14)
    np.testing.assert_allclose(frame_weights(scores, scale=7.0), frame_weights(scores), rtol=1e-14)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [0.5, math.nan]])
def test_scores_without_information_weigh_alike_and_say_so(scores: list[float]) -> None:
    """Statement: all-zero and NaN scores give uniform weights, with a warning."""
    with pytest.warns(UserWarning, match="weigh alike"):
        assert frame_weights(np.array(scores)).tolist() == [0.5, 0.5]


def test_the_official_cap_is_one_pass_in_order() -> None:
    """Statement: what a later frame cannot take is lost to earlier ones (worked by hand)."""
    # two frames give away what no third can take
    found = clipped(np.array([0.5, 0.2, 0.3]), 0.2)
    assert found.tolist() == [0.2, 0.2, 0.2]
    found = clipped(np.array([0.6, 0.3, 0.1]), 0.4)
    np.testing.assert_allclose(found, [0.4, 0.3 + 0.3 / 0.8 * 0.2, 0.1 + 0.1 / 0.8 * 0.2])
    assert found.sum() < 1


@given(scores=SCORES, cap=st.floats(0.05, 1.0))
@settings(max_examples=100, deadline=None)
def test_waterfilling_loses_nothing_that_fits(scores: list[float], cap: float) -> None:
    """Statement: no weight above the cap, the sum stays 1 wherever the frames can hold it, order of weights is kept."""
    if not sum(s**2 for s in scores) > 1e-12:
        return
    weights = frame_weights(np.array(scores))
    filled = waterfilled(weights, cap)
    assert (filled <= cap * (1 + 1e-12)).all()
    assert math.isclose(filled.sum(), min(1.0, cap * len(scores)), rel_tol=1e-9)
    assert (np.diff(filled[np.argsort(weights, kind="stable")]) >= -1e-12).all()


@given(
    scores=SCORES,
    total=st.integers(1, 200),
    size=st.integers(1, 40),
    cap=st.sampled_from(sorted(CAPS)),
    remainder=st.sampled_from(["drop", "largest"]),
    least=st.integers(0, 2),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore:frame scores")
def test_budgets_stay_within_bounds(
    scores: list[float], total: int, size: int, cap: str, remainder: str, least: int
) -> None:
    """Statement: never above the total, the cap, or below the least; exact with waterfilling and largest remainders."""
    frames = len(scores)
    weights = frame_weights(np.array(scores))
    if least * frames > total or least > size:
        with pytest.raises(BudgetError, match="min_tokens_per_frame"):
            frame_budgets(weights, total, size, cap, remainder, least)
        return
    budgets = frame_budgets(weights, total, size, cap, remainder, least)
    assert sum(budgets) <= total
    assert min(budgets) >= least
    assert any(budgets)
    if cap != "none":
        assert max(budgets) <= size
    if remainder == "largest" and cap != "official":
        assert sum(budgets) == (total if cap == "none" else min(total, frames * size))


def test_a_budget_below_the_number_of_frames_goes_to_the_best() -> None:
    """Statement: where every share is below one token, the best frames get one each, earlier first among equals."""
    weights = frame_weights(np.array([0.5, 0.6, 0.5, 0.5, 0.6]))
    assert frame_budgets(weights, 3, 9) == [1, 1, 0, 0, 1]


def test_one_frame_takes_the_whole_budget() -> None:
    """Statement: a single frame gets everything, even with score 0."""
    with pytest.warns(UserWarning, match="weigh alike"):
        assert frame_budgets(frame_weights(np.zeros(1)), 7, 9) == [7]


def test_grids() -> None:
    """Statement: squares give the largest square or one row more; others keep their aspect; none above the share."""
    assert [frame_grid(b, (27, 27)) for b in (0, 1, 2, 3, 5, 6, 130)] == [
        (0, 0), (1, 1), (2, 1), (2, 1), (2, 2), (3, 2), (11, 11),
    ]  # fmt: skip
    assert frame_grid(18, (4, 8)) == (3, 6)
    assert frame_grid(2, (2, 9)) == (1, 2)
    for source in ((4, 8), (9, 2), (5, 5), (1, 7)):
        for share in range(1, source[0] * source[1] + 1):
            h, w = frame_grid(share, source)
            assert 1 <= h * w <= share
            assert h <= source[0]
            assert w <= source[1]


def test_the_sampler_takes_more_frames_of_longer_videos() -> None:
    """Statement: base + trunc(hours * per_hour) frames, evenly from the first to the last, repeated in short videos."""
    taken = sampled_frames(3 * 3600 + 60, 10_000)
    assert len(taken) == 96 + 193
    assert (taken[0], taken[-1]) == (0, 9_999)
    assert sampled_frames(1.0, 3, base=5).tolist() == [0, 0, 1, 1, 2]


def test_fused_frames_share_the_mean_of_their_scores() -> None:
    """Statement: two fused frames have their mean score, an odd last frame its own; other numbers are refused."""
    assert scores_per_view(np.array([0.2, 0.4, 0.6]), 2, 2).tolist() == pytest.approx([0.3, 0.6])
    assert scores_per_view(np.array([0.2, 0.4]), 2, 2).tolist() == [0.2, 0.4]
    with pytest.raises(InputError, match="5 frame scores for a video of 2 views"):
        scores_per_view(np.ones(5), 2, 2)


def test_newlines_close_every_row() -> None:
    """Statement: one newline behind every row of every frame, none for a frame that vanished."""
    tokens, newline = torch.arange(8.0)[:, None], torch.tensor([-1.0])
    found = with_newlines(tokens, [(2, 2), (0, 0), (1, 4)], newline)
    assert found.flatten().tolist() == [0, 1, -1, 2, 3, -1, 4, 5, 6, 7, -1]
