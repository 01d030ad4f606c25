"""QuoTA: shares of frames, and how the method answers for itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError, ParameterError
from foveate.pruners import Layout, QuoTA
from foveate.pruners.core.resampling import distinct_places
from tests.pruners.synthetic import CLIP, QWEN, anyres, first_stage, make_tokens, run


def test_a_frame_without_a_token_vanishes_and_cells_sit_under_their_centres() -> None:
    """Statement: shares follow the scores; survivors stand on the token under each cell's centre."""
    tokens = make_tokens(Layout.video(3, 4, 4), 1, 0)
    tokens.frame_scores = [[0.9, 0.0, 0.3]]
    chosen = run(QuoTA(keep=10), tokens)
    # shares 9 and 1: a 3 x 3 grid on 4 x 4 tokens, nothing, one token
    assert chosen.index.tolist() == [[0, 2, 3, 8, 10, 11, 12, 14, 15, 42]]


def test_a_dominant_frame_is_enlarged_unless_capped() -> None:
    """Statement: without a cap a frame may take more tokens than it had, from its neighbours' places; with one it may
    not.
    """
    tokens = make_tokens(Layout.video(3, 2, 2), 1, 0)
    tokens.frame_scores = [[0.0, 1.0, 0.0]]
    free, capped = (run(QuoTA(keep=9, cap=cap), tokens) for cap in (None, "waterfill"))
    assert free.index.shape == (1, 9)
    assert capped.values.shape[1] == 4 + 2 + 2
    torch.testing.assert_close(capped.values[0, 2:6], tokens.embeds[0, 4:8])
    big = torch.nn.functional.interpolate(
        tokens.embeds[0, 4:8].view(1, 2, 2, -1).permute(0, 3, 1, 2), (3, 3), mode="bilinear"
    )
    torch.testing.assert_close(free.values[0], big[0].flatten(1).T)


def test_frames_as_they_were_before_pooling_are_resampled_where_there_are_any() -> None:
    """Statement: the un-pooled frames give the values, the pooled tokens only their places."""
    tokens = make_tokens(Layout.video(2, 2, 2), 1, 0)
    tokens.frame_scores = [[1.0, 0.0]]
    unpooled = torch.randn(1, 2 * 9, tokens.embeds.shape[-1], generator=torch.Generator().manual_seed(3))
    stage = first_stage(QuoTA(keep=4), replace(CLIP, pools_frames=True))
    chosen = stage.select(tokens, unpooled=unpooled)
    small = torch.nn.functional.interpolate(
        unpooled[0, :9].view(1, 3, 3, -1).permute(0, 3, 1, 2), (2, 2), mode="bilinear"
    )
    torch.testing.assert_close(chosen.values[0], small[0].flatten(1).T)
    assert chosen.index.tolist() == [[0, 1, 2, 3]]
    assert not first_stage(QuoTA(assigner="tome"), replace(CLIP, pools_frames=True)).signals


def test_pictures_need_no_scores() -> None:
    """Statement: a picture is one frame; the views of an AnyRes picture share the budget by their size."""
    for layout in (Layout.grid(4, 4), anyres((2, 2), [2, 1], [3, 2])):
        tokens = make_tokens(layout, 1, 0)
        tokens.frame_scores = None
        index = run(QuoTA(keep=0.5), tokens).index[0]
        assert 0 < len(index) <= round(layout.size / 2)
        assert all(((index >= view.tokens()[0]) & (index <= view.tokens()[-1])).any() for view in layout.views)


def test_a_video_without_scores_is_refused() -> None:
    """Statement: missing scores are an error that says what to do, never a silent uniform split."""
    tokens = make_tokens(Layout.video(3, 4, 4), 1, 0)
    tokens.frame_scores = None
    with pytest.raises(InputError, match="set session"):
        run(QuoTA(), tokens)
    assert run(QuoTA(scores=torch.tensor([0.1, 0.2, 0.3])), tokens).index.shape[0] == 1


def test_three_axis_positions_never_enlarge_a_frame() -> None:
    """Statement: on m-RoPE models the default cap is waterfill, and cap='none' is refused."""
    tokens = make_tokens(Layout.video(3, 2, 2), 1, 0)
    tokens.frame_scores = [[0.0, 1.0, 0.0]]
    assert run(QuoTA(keep=9), tokens, QWEN).values.shape[1] == 4 + 2 + 2
    with pytest.raises(ParameterError, match="cap='none'"):
        QuoTA(cap="none").stages(QWEN)


@pytest.mark.parametrize(
    "bad",
    [{"assigner": "v1"}, {"cap": "all"}, {"remainder": "first"}, {"score_power": 0.0}, {"score_scale": math.inf},
     {"min_tokens_per_frame": -1}],
)  # fmt: skip
def test_bad_parameters_are_refused(bad: dict) -> None:
    """Statement: unusable values are refused when the method is configured."""
    with pytest.raises(ParameterError, match=next(iter(bad))):
        QuoTA(**bad)


def test_exact_budgets_are_announced_as_exact() -> None:
    """Statement: only waterfill, largest remainders and an assigner of exact numbers give a count before the scores."""
    video = Layout.video(2, 2, 2)
    assert QuoTA(keep=5, assigner="linspace", cap="waterfill", remainder="largest").count(video) == 5
    assert QuoTA().count(video) is None
    assert QuoTA(assigner="linspace", cap="waterfill").count(video) is None


@pytest.mark.parametrize("scores", [[0.5, -0.1], [], [[0.5]], [math.inf]])
def test_impossible_scores_are_refused(scores: list) -> None:
    """Statement: negative, infinite, missing or nested scores are refused."""
    with pytest.raises(InputError):
        QuoTA(scores=scores)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=n))))
@settings(max_examples=200, deadline=None)
def test_seats_are_unique_and_near(drawn: tuple[int, list[int]]) -> None:
    """Statement: seats ascend, are unique and inside; targets that are so already keep their own."""
    n, targets = drawn[0], sorted(drawn[1])
    found = distinct_places(torch.tensor(targets, dtype=torch.long), n).tolist()
    assert sorted(set(found)) == found
    assert all(0 <= seat < n for seat in found)
    if len(set(targets)) == len(targets):
        assert found == targets
