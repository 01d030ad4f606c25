"""HiPrune: budgets, neighbours at the border, exclusion, layers."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import MissingSignalError, ParameterError
from foveate.pruners import HiPrune, Layout, ModelInfo
from foveate.pruners.core.selection import kept_tokens
from foveate.pruners.core.signals import ClassAttention, ReceivedAttention
from foveate.pruners.hiprune import anchor_count, anchors, anchors_and_buffers, per_view_budget, registers
from tests.pruners.synthetic import CLIP, QWEN, anyres, first_stage, make_tokens


def members(anchor: list[int], grid: tuple[int, int], k: int = 99, **options: str) -> list[int]:
    """Tokens of the core around these anchors."""
    return anchors_and_buffers(torch.tensor([anchor]), k, grid, **options)[0].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize(
    ("k", "alpha", "count"),
    [(192, 0.1, 4), (128, 0.1, 3), (64, 0.1, 1), (32, 0.1, 1), (25, 0.1, 0), (200, 0.1, 4), (19, 0.5, 2), (75, 0.1, 2)],
)
def test_anchor_counts(k: int, alpha: float, count: int) -> None:
    """Statement: ``round(k * alpha / 5)``, half to even, as published for the three LLaVA budgets."""
    assert anchor_count(k, alpha) == count


def test_inner_neighbours() -> None:
    """Statement: each neighbourhood is what its name says, and its size divides the anchors' share."""
    assert members([12], (5, 5)) == [7, 11, 12, 13, 17]
    assert members([12], (5, 5), buffer="square") == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert members([12], (5, 5), buffer="row") == [11, 12, 13]
    assert members([12], (5, 5), buffer="none") == [12]
    assert [anchor_count(90, 1.0, b) for b in ("cross", "square", "row", "none")] == [18, 10, 30, 90]


def test_official_border_wraps_and_clamps() -> None:
    """Statement: flat indices wrap into the neighbouring row; above the first and below the last row they clamp."""
    assert members([5], (3, 5)) == [0, 4, 5, 6, 10]  # left neighbour of a row's first token ends the row above
    assert members([2], (3, 5)) == [0, 1, 2, 3, 7]  # above the first row: token 0
    assert members([12], (3, 5)) == [7, 11, 12, 13, 14]  # below the last row: token N - 1
    assert members([0], (3, 5)) == [0, 1, 5]


def test_grid_border_keeps_true_neighbours_only() -> None:
    """Statement: ``border="grid"`` drops what lies outside the picture."""
    assert members([5], (3, 5), border="grid") == [0, 5, 6, 10]
    assert members([2], (3, 5), border="grid") == [1, 2, 3, 7]
    assert members([0], (3, 5), border="grid", buffer="square") == [0, 1, 5, 6]


def test_a_core_larger_than_the_budget_is_cut_in_order() -> None:
    """Statement: anchors enter in rank order, each followed by -1, +1, -w, +w, until the budget is full."""
    everything = [12, 11, 13, 7, 17, 24, 23]  # the last anchor's right neighbour clamps onto itself
    for k in range(1, 8):
        assert members([12, 24], (5, 5), k=k) == sorted(everything[:k])


def test_exactly_k_tokens_for_every_share() -> None:
    """Statement: any alpha keeps exactly the budget, never a token twice."""
    torch.manual_seed(0)
    anchor, deep = torch.rand(3, 48), torch.rand(3, 48)
    for alpha in (0.0, 0.1, 0.5, 0.9, 1.0):
        for k in (1, 4, 5, 17, 47):
            index = (
                HiPrune(keep=k, alpha=alpha)
                .select(make_tokens(Layout.grid(6, 8), 3, 0), anchor=anchor, deep=deep)
                .index
            )
            assert index.shape == (3, k)
            assert (index >= 0).all()


def test_without_anchors_only_registers_count() -> None:
    """Statement: a share that rounds to no anchor is selection by the deep block alone."""
    torch.manual_seed(1)
    anchor, deep = torch.rand(1, 30), torch.rand(1, 30)
    assert anchor_count(12, 0.1) == 0
    index = HiPrune(keep=12, alpha=0.1).select(make_tokens(Layout.grid(5, 6), 1, 0), anchor=anchor, deep=deep).index
    assert index[0].tolist() == sorted(deep[0].topk(12).indices.tolist())


def test_official_exclusion_counts_strong_tokens_twice() -> None:
    """Statement: subtracting 1 excludes when scores are below 1, and lets sinks be picked twice when they are above."""
    core = torch.tensor([[True, False, False, False]])
    sums = torch.tensor([[9.0, 0.5, 0.4, 0.3]])
    assert (core | registers(sums, core, 3, "strict"))[0].tolist() == [True, True, True, False]
    assert (core | registers(sums, core, 3, "official"))[0].tolist() == [True, True, False, False]
    means = sums / 100
    assert torch.equal(registers(means, core, 3, "official"), registers(means, core, 3, "strict"))


def test_official_exclusion_works_on_sums_where_there_is_no_class_token() -> None:
    """Statement: ``exclude="official"`` sees mean-one scores on Qwen towers and may keep fewer tokens, which is
    announced.
    """
    method = HiPrune(keep=4, alpha=1.0, buffer="none", exclude="official")
    assert method.count(Layout.grid(2, 4)) is None
    assert HiPrune(keep=4).count(Layout.grid(2, 4)) == 4
    attention = torch.tensor([[90.0, 2, 1, 1, 1, 1, 1, 1], [8.0, 7, 6, 5, 4, 3, 2, 1]]) / 100
    tokens = make_tokens(Layout.grid(2, 4), 2, 0)
    half = HiPrune(keep=4, alpha=0.5, buffer="none", exclude="official")
    (stage,) = half.stages(QWEN)
    assert stage.select(tokens, anchor=attention, deep=attention).index.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]
    (stage,) = half.stages(CLIP)
    assert stage.select(tokens, anchor=attention, deep=attention).index.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_budgets_of_views() -> None:
    """Statement: ``int(total / V)`` per view, as published for 3 and 5 views; nothing is lost to views that are too
    small.
    """
    assert per_view_budget(640, (576,) * 5) == (128,) * 5
    assert [per_view_budget(k, (576,) * 3)[0] for k in (640, 320, 160)] == [213, 106, 53]
    assert per_view_budget(12, (8, 8, 2)) == (5, 5, 2)
    assert per_view_budget(18, (8, 8, 2)) == (8, 8, 2)
    assert per_view_budget(2, (4, 4, 4)) == (1, 1, 0)


def test_views_do_not_compete() -> None:
    """Statement: each view spends its own budget, whatever the scores of the others."""
    layout = anyres((3, 3), [3], [3, 3])
    scores = torch.rand(2, 27, generator=torch.Generator().manual_seed(0))
    scores[:, layout.views[1].tokens()] += 10
    index = HiPrune(keep=12).select(make_tokens(layout, 2, 0), anchor=scores, deep=scores).index
    assert all(int(torch.isin(row, view.tokens()).sum()) == 4 for row in index for view in layout.views)


def test_layers_follow_the_published_ones() -> None:
    """Statement: object block 9 of 24 for CLIP-L and 16 of 32 for Qwen2.5-VL (counted from 1), registers where features
    leave.
    """
    assert dict(first_stage(HiPrune()).signals) == {"anchor": ReceivedAttention(8), "deep": ReceivedAttention(22)}
    assert dict(first_stage(HiPrune(), QWEN).signals) == {
        "anchor": ReceivedAttention(15),
        "deep": ReceivedAttention(31),
    }
    siglip = ModelInfo(encoder_layers=26, feature_layer=25, class_token=False)
    assert first_stage(HiPrune(), siglip).signals["anchor"] == ReceivedAttention(9)
    windowed = ModelInfo(encoder_layers=20, feature_layer=19, class_token=False, full_attention=(4, 9, 19))
    assert first_stage(HiPrune(), windowed).signals["anchor"] == ReceivedAttention(9)


def test_bad_layers_are_refused() -> None:
    """Statement: a windowed, missing or 0-based first block is an error that says so."""
    with pytest.raises(ParameterError, match="windows"):
        HiPrune(object_layer=10).stages(QWEN)
    with pytest.raises(ParameterError, match="counted from 1"):
        HiPrune(object_layer=0).stages(CLIP)
    with pytest.raises(ParameterError, match=r"0 \.\. 23"):
        HiPrune(object_layer=25).stages(CLIP)


def test_class_rows_need_a_class_token() -> None:
    """Statement: ``query_rows="cls"`` reads class attention, or names signal, tower and way out where there is none."""
    assert first_stage(HiPrune(query_rows="cls")).signals["deep"] == ClassAttention(22)
    with pytest.raises(MissingSignalError, match=r"class token.*Qwen2_5_VisionTransformer.*query_rows='all'"):
        HiPrune(query_rows="cls").stages(QWEN)


def test_separators_are_dropped_unless_asked_for() -> None:
    """Statement: as published, no newline separators reach the decoder; on request those of rows with a token do."""
    assert first_stage(HiPrune()).newlines == "drop"
    assert first_stage(HiPrune(newline="rows")).newlines == "rows"


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.5}, {"buffer": "circle"}, {"border": "wrap"}, {"exclude": "no"}, {"newline": "keep"}]
)
def test_bad_parameters_are_named(wrong: dict[str, object]) -> None:
    """Statement: an unusable value is refused by value."""
    with pytest.raises(ParameterError, match=str(next(iter(wrong.values())))):
        HiPrune(**wrong)


def test_anchors_and_masks_break_ties_by_index() -> None:
    """Statement: equal scores go to the lower index; masks list ascending tokens padded with -1."""
    assert anchors(torch.tensor([[1.0, 3.0, 3.0, 1.0]]), 3).tolist() == [[1, 2, 0]]
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert kept_tokens(mask).tolist() == kept_tokens(mask, 2).tolist() == [[0, 2], [1, -1]]


def test_tokens_without_a_score_come_last() -> None:
    """Statement: NaN never makes an anchor or a register, and the budget is met even where only such are left."""
    nan = float("nan")
    assert anchors(torch.tensor([[nan, 1.0, 3.0, nan]]), 2).tolist() == [[2, 1]]
    core = torch.tensor([[True, False, False, False, False]])
    deep = torch.tensor([[9.0, nan, 0.1, nan, 0.2]])
    for exclude in ("strict", "official"):
        assert registers(deep / 10, core, 3, exclude)[0].tolist() == [False, False, True, False, True]
    assert registers(deep, core, 4)[0].tolist() == [False, True, True, False, True]
    unknown = torch.full((1, 8), nan)
    chosen = HiPrune(keep=4).select(make_tokens(Layout.grid(2, 4), 1, 0), anchor=unknown, deep=unknown)
    assert chosen.index.tolist() == [[0, 1, 2, 3]]


def test_the_strict_count_is_not_read_from_the_device() -> None:
    """Statement: with a known count nothing waits for a tensor's value: tensors that have none pass."""
    scores = torch.rand(2, 16, device="meta")
    assert HiPrune(keep=5).select(make_tokens(Layout.grid(4, 4), 2, 0), anchor=scores, deep=scores).index.shape == (
        2,
        5,
    )
    with pytest.raises(RuntimeError, match="meta"):
        HiPrune(keep=5, exclude="official").select(make_tokens(Layout.grid(4, 4), 2, 0), anchor=scores, deep=scores)
