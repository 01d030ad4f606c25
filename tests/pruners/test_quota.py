"""QuoTA: weights, caps, budgets, grids, assigners, and how the method answers for itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError, ParameterError
from foveate.pruners import Layout, QuoTA
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
from foveate.pruners.core.frame_questions import FramePrompts, parsed_objects
from foveate.pruners.core.resampling import GRID, PLANS, matching_rounds, merged, pooled
from foveate.pruners.quota import seats
from tests.pruners.synthetic import CLIP, QWEN, anyres, first_stage, make_tokens, run

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


# --------------------------------------------------------------------------------------------------------- allocation


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


@pytest.mark.parametrize("scores", [[0.5, -0.1], [], [[0.5]], [math.inf]])
def test_impossible_scores_are_refused(scores: list) -> None:
    """Statement: negative, infinite, missing or nested scores are refused."""
    with pytest.raises(InputError):
        QuoTA(scores=scores)


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
    """Statement: square frames give the largest square or one row more; others keep their aspect; none above the share."""
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
    """Statement: a view of two fused frames has their mean score, an odd last frame its own; other numbers are refused."""
    assert scores_per_view(np.array([0.2, 0.4, 0.6]), 2, 2).tolist() == pytest.approx([0.3, 0.6])
    assert scores_per_view(np.array([0.2, 0.4]), 2, 2).tolist() == [0.2, 0.4]
    with pytest.raises(InputError, match="5 frame scores for a video of 2 views"):
        scores_per_view(np.ones(5), 2, 2)


# ---------------------------------------------------------------------------------------------------------- assigners


@pytest.mark.parametrize("assigner", sorted(PLANS))
def test_assigners_agree_with_a_plain_account(assigner: str) -> None:
    """Statement: each assigner gives what its definition says, cell by cell (spelled out with loops), and in a batch."""
    g = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 5, 5, 3, generator=g)
    cells = (3, 2) if assigner in GRID else 7
    found = PLANS[assigner](frames, cells)(frames)
    for frame, mine in zip(frames, found):
        torch.testing.assert_close(mine, PLAIN[assigner](frame, cells), rtol=0, atol=1e-5)


def plain_bilinear(frame: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    rows, cols = frame.shape[:2]
    made = []
    for i in range(cells[0]):
        for j in range(cells[1]):
            y, x = max((i + 0.5) * rows / cells[0] - 0.5, 0), max((j + 0.5) * cols / cells[1] - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, cols - 1)
            upper = frame[top, left] * (1 - x + left) + frame[top, right] * (x - left)
            lower = frame[bottom, left] * (1 - x + left) + frame[bottom, right] * (x - left)
            made.append(upper * (1 - y + top) + lower * (y - top))
    return torch.stack(made)


def plain_average(frame: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    (rows, cols), (h, w) = frame.shape[:2], cells
    return torch.stack(
        [
            frame[i * rows // h : -(-(i + 1) * rows // h), j * cols // w : -(-(j + 1) * cols // w)].mean(dim=(0, 1))
            for i in range(h)
            for j in range(w)
        ]
    )


def plain_tome(tokens: torch.Tensor, k: int) -> torch.Tensor:
    while len(tokens) > k:
        unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
        best = [max((float(unit[a] @ unit[b]), -b) for b in range(1, len(tokens), 2)) for a in range(0, len(tokens), 2)]
        order = sorted(range(len(best)), key=lambda a: -best[a][0])
        r = min(len(tokens) - k, len(tokens) // 2)
        joined = {b: [tokens[b]] for b in range(1, len(tokens), 2)}
        for a in order[:r]:
            joined[-best[a][1]].append(tokens[2 * a])
        tokens = torch.stack([tokens[2 * a] for a in order[r:]] + [torch.stack(j).mean(0) for j in joined.values()])
    return tokens


def plain_separable(frame: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    rows = torch.stack([plain_tome(row, cells[1]) for row in frame])
    return torch.stack([plain_tome(rows[:, j], cells[0]) for j in range(cells[1])], dim=1).flatten(0, 1)


PLAIN = {
    "bilinear": plain_bilinear,
    "adaptive_avg": plain_average,
    "linspace": lambda frame, k: frame.flatten(0, 1)[[int(i * 24 / (k - 1)) for i in range(k)]],
    "tome": lambda frame, k: plain_tome(frame.flatten(0, 1), k),
    "separable_tome": plain_separable,
}


def test_merging_can_be_repeated_on_other_features() -> None:
    """Statement: the rounds found on some features merge others the same way, so that DeepStack levels can follow."""
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1))
    rounds = matching_rounds(x, 4)
    torch.testing.assert_close(merged(torch.cat([x, 2 * x], dim=-1), rounds)[..., 4:], 2 * merged(x, rounds))


def test_pooling_halves_both_sides_rounding_up() -> None:
    """Statement: the model's own pooling makes 27 x 27 patches 14 x 14 tokens."""
    assert pooled(torch.zeros(2, 27, 27, 1)).shape == (2, 14, 14, 1)


def test_newlines_close_every_row() -> None:
    """Statement: one newline behind every row of every frame, none for a frame that vanished."""
    tokens, newline = torch.arange(8.0)[:, None], torch.tensor([-1.0])
    found = with_newlines(tokens, [(2, 2), (0, 0), (1, 4)], newline)
    assert found.flatten().tolist() == [0, 1, -1, 2, 3, -1, 4, 5, 6, 7, -1]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=n))))
@settings(max_examples=200, deadline=None)
def test_seats_are_unique_and_near(drawn: tuple[int, list[int]]) -> None:
    """Statement: seats ascend, are unique and inside; targets that are so already keep their own."""
    n, targets = drawn[0], sorted(drawn[1])
    found = seats(torch.tensor(targets, dtype=torch.long), n).tolist()
    assert sorted(set(found)) == found
    assert all(0 <= seat < n for seat in found)
    if len(set(targets)) == len(targets):
        assert found == targets


# ------------------------------------------------------------------------------------------------------------- method


def test_a_frame_without_a_token_vanishes_and_cells_sit_under_their_centres() -> None:
    """Statement: shares follow the scores; survivors stand on the token under each cell's centre."""
    tokens = make_tokens(Layout.video(3, 4, 4), 1, 0)
    tokens.frame_scores = [[0.9, 0.0, 0.3]]
    chosen = run(QuoTA(keep=10), tokens)
    # shares 9 and 1: a 3 x 3 grid on 4 x 4 tokens, nothing, one token
    assert chosen.index.tolist() == [[0, 2, 3, 8, 10, 11, 12, 14, 15, 42]]


def test_a_dominant_frame_is_enlarged_unless_capped() -> None:
    """Statement: without a cap a frame may take more tokens than it had, from its neighbours' places; with one it may not."""
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
    """Statement: only waterfill with largest remainders and an assigner of exact numbers is not adaptive."""
    assert not QuoTA(assigner="linspace", cap="waterfill", remainder="largest").adaptive
    assert QuoTA().adaptive
    assert QuoTA(assigner="linspace", cap="waterfill").adaptive


# ---------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('Step 1: Yes\nStep 2: ["A"]\nStep 3: ["Red Car", "dog"]', ["red car", "dog"]),
        ('step 1: yes\nstep 3: [\n "a",\n "b"\n]', ["a", "b"]),
        ('step 1: no\nstep 3: ["a"]', []),
        ("step 1: yes\nstep 3: null", []),
        ("step 1: yes\nstep 3: [1, 2]", []),
        ("step 1: yes\nstep 3: [__import__('os').getcwd()]", []),
        ("step 1: yes\nstep 3: [open('x')]", []),
        ('step 1: maybe\nstep 1: yes\nstep 3: ["a"]', ["a"]),
        ('step 1: yes\nstep 3: ["a"', []),
        ("step 1: yes\nstep 3: [" + "(" * 5000 + "]", []),
        ("", []),
        ("\0 junk", []),
    ],
)
def test_replies_are_read_as_literals(reply: str, objects: list[str]) -> None:
    """Statement: only a list of strings behind step 3 counts, after a yes; nothing in a reply is ever run."""
    assert parsed_objects(reply) == objects


def test_every_frame_is_asked_about_the_objects_or_the_question() -> None:
    """Statement: with objects the prompt names them, without it quotes the question; braces in a question do no harm."""
    prompts = FramePrompts()
    assert "red car, dog" in prompts.about("Who?", ["red car", "dog"])
    assert "Who {is} it?" in prompts.about("Who {is} it?", [])
    assert "Who" not in prompts.about("Who?", ["dog"])
