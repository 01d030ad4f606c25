"""FoPru: significance, ranks, rows and their budgets."""

from __future__ import annotations

import pytest
import torch

from foveate.cuda import given_attention, received_attention
from foveate.errors import ParameterError
from foveate.pruners import FoPru, Layout, ModelInfo
from foveate.pruners.core.signals import GivenAttention, ReceivedAttention
from foveate.pruners.fopru import best_rows, rank, significance
from tests.pruners.synthetic import CLIP, QWEN, anyres, first_stage, make_tokens


def test_the_vector_with_larger_variance_wins_for_every_image_by_itself() -> None:
    """Statement: significance is chosen per image by unbiased variance."""
    flat, peaked = torch.tensor([1.0, 1.1, 0.9, 1.0]), torch.tensor([0.0, 3.0, 0.0, 1.0])
    received, given = torch.stack([flat, peaked]), torch.stack([peaked, flat])
    assert torch.equal(significance(received, given), torch.stack([peaked, peaked]))


def test_equal_variances_take_received() -> None:
    """Statement: a tie between the two directions goes to attention received."""
    received, given = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    assert torch.equal(significance(received, given), received)


def test_given_attention_is_constant_without_class_token() -> None:
    """Statement: softmax rows sum to one, so without prefix tokens only received attention can tell tokens apart."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    torch.testing.assert_close(given_attention(q, k), torch.full((1, 9), 1 / 9))
    assert received_attention(q, k).var() > 1e-6


def test_ties_go_to_the_lower_index() -> None:
    """Statement: equal scores keep raster order, in ranks and rows."""
    assert rank(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4).tolist() == [[1, 2, 4, 0]]
    assert best_rows(torch.ones(1, 6), (3, 2), 2).tolist() == [[0, 1, 2, 3]]


def test_tokens_without_a_score_come_last() -> None:
    """Statement: NaN never makes a token or its row significant."""
    score = torch.tensor([[float("nan"), 1.0, 0.5, 2.0]])
    assert rank(score, 3).tolist() == [[3, 1, 2]]
    assert best_rows(score, (2, 2), 1).tolist() == [[2, 3]]


def test_rows_are_ranked_by_their_sum() -> None:
    """Statement: ``row`` keeps whole rows with the largest summed significance, not those with the largest token."""
    score = torch.tensor([[9.0, 0.0, 0.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0]])
    assert best_rows(score, (3, 3), 1).tolist() == [[3, 4, 5]]
    chosen = FoPru(strategy="row", keep=3, direction="received").choose(
        make_tokens(Layout.grid(3, 3), 1, 0), 3, received=score
    )
    assert chosen.index.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("keep", "grid", "kept"),
    [
        (0.25, (24, 24), 144),
        (0.5, (8, 8), 32),
        (0.3, (10, 7), 21),
        (0.01, (4, 5), 5),
        (100, (24, 24), 96),
        (24, (24, 24), 24),
    ],
)
def test_row_budgets(keep: float, grid: tuple[int, int], kept: int) -> None:
    """Statement: ``floor(ratio * rows)`` rows, or ``k // cols`` rows of an absolute budget, at least one."""
    assert FoPru(strategy="row", keep=keep).count(Layout.grid(*grid)) == kept


def test_a_budget_below_one_row_is_exceeded_aloud() -> None:
    """Statement: the one case where more than the budget is kept is warned about."""
    with pytest.warns(UserWarning, match="less than a row of 6"):
        assert FoPru(strategy="row", keep=4).count(Layout.grid(4, 6)) == 6


def test_rank_budgets_round_down() -> None:
    """Statement: a ratio keeps ``floor(N * ratio)``, free of binary representation error, at least one."""
    assert FoPru(keep=0.29).count(Layout.grid(1, 100)) == 29
    assert FoPru(keep=0.999).count(Layout.grid(1, 10)) == 9
    assert FoPru(keep=0.001).count(Layout.grid(1, 10)) == 1


def test_rows_need_the_grid() -> None:
    """Statement: a row budget follows from rows and columns, not from the number of tokens."""
    for grid, kept in {(6, 6): 12, (4, 9): 9, (9, 4): 12, (36, 1): 12, (3, 12): 12}.items():
        assert FoPru(strategy="row", keep=12).count(Layout.grid(*grid)) == kept
    assert [FoPru(strategy="row").count(Layout.grid(*grid)) for grid in ((4, 9), (9, 4))] == [9, 8]


def test_every_crop_is_judged_by_itself() -> None:
    """Statement: direction and ranks are per view, with budgets in proportion to the views' sizes."""
    layout = anyres((2, 2), [2], [2, 4])
    assert FoPru(keep=8).budgets(layout) == (2, 2, 4)
    received = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    received[:, layout.views[0].tokens()] *= 100  # a louder view gets no larger share
    index = FoPru(keep=8, direction="received").select(make_tokens(layout, 1, 0), received=received).index[0]
    assert [int(torch.isin(index, view.tokens()).sum()) for view in layout.views] == [2, 2, 4]


def test_survivors_keep_raster_order_unless_told() -> None:
    """Statement: the order of entry is ascending, or by significance with ``reorder=False``."""
    received = torch.tensor([[0.1, 0.9, 0.3, 0.8]])
    tokens = make_tokens(Layout.grid(2, 2), 1, 0)
    assert FoPru(keep=3, direction="received").select(tokens, received=received).order is None
    shuffled = FoPru(keep=3, direction="received", reorder=False).select(tokens, received=received)
    assert shuffled.index.gather(1, shuffled.order).tolist() == [[1, 3, 2]]


def test_reads_the_block_that_feeds_the_projector() -> None:
    """Statement: block 22 of 24 for CLIP in LLaVA, patch rows only; only the asked direction is read."""
    assert dict(first_stage(FoPru()).signals) == {
        "received": ReceivedAttention(22, "patches"),
        "given": GivenAttention(22),
    }
    assert dict(first_stage(FoPru(layer=-1, direction="given", score_kind="logits")).signals) == {
        "given": GivenAttention(23, logits=True)
    }


def test_windowed_blocks_are_refused() -> None:
    """Statement: a block without full attention, or one that does not exist, is named as an error."""
    with pytest.raises(ParameterError, match="7, 15, 23, 31"):
        FoPru(layer=8).stages(QWEN)
    with pytest.raises(ParameterError, match=r"0 \.\. 23"):
        FoPru(layer=24).stages(CLIP)


@pytest.mark.parametrize("wrong", [{"strategy": "best"}, {"score_kind": "softmax"}, {"direction": "both"}])
def test_bad_parameters_are_named(wrong: dict[str, str]) -> None:
    """Statement: an unknown choice is refused with its value."""
    with pytest.raises(ParameterError, match=next(iter(wrong.values()))):
        FoPru(**wrong)


def test_works_without_class_token() -> None:
    """Statement: nothing is asked for that a tower without class token lacks."""
    assert FoPru().stages(ModelInfo(class_token=False))
