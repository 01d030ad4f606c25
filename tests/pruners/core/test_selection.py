"""Budgets, rankings, views and their joint selections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.pruners import Layout, Selection, Tokens
from foveate.pruners.core.selection import budget, floor, per_view, ranked, split_budget, top_k, view_id
from tests.pruners.synthetic import anyres, make_tokens


@given(st.lists(st.integers(0, 600), min_size=1, max_size=6), st.floats(0, 1))
def test_shares_are_exact_and_fit(sizes: list[int], part: float) -> None:
    """Statement: shares add up to the total, none exceeds its part, each is within one of exact proportion."""
    sizes[0] += 1
    total = round(part * sum(sizes))
    shares = split_budget(total, tuple(sizes))
    assert sum(shares) == total
    assert all(0 <= share <= size for share, size in zip(shares, sizes))
    assert all(abs(share - total * size / sum(sizes)) < 1 for share, size in zip(shares, sizes))


def test_rounding() -> None:
    """Statement: half to even by default, floor that forgives representation, never zero, never above the picture."""
    assert [budget(0.5, n) for n in (1, 3, 5)] == [1, 2, 2]
    assert budget(0.29, 100, floor) == 29
    assert budget(0.001, 5) == 1
    assert budget(0.5, 0) == 0


def test_top_k_is_stable_and_survives_nan() -> None:
    """Statement: ties go to the lower index, NaN is never preferred, the result is ascending."""
    scores = torch.tensor([float("nan"), 1.0, 2.0, 1.0, float("inf")])
    assert top_k(scores, 3).tolist() == [1, 2, 4]
    assert ranked(scores).tolist() == [4, 2, 1, 3, 0]


def first(tokens: Tokens, k: int, mark: torch.Tensor) -> Selection:
    """Keep the view's first ``k`` tokens, valued with ``mark``; the last one speaks for the rest and enters first."""
    batch, n = tokens.embeds.shape[:2]
    index = torch.arange(k).expand(batch, -1)
    owner = torch.arange(n).clamp(max=k - 1).expand(batch, -1)
    values = mark[:, :k, None].expand(-1, -1, tokens.embeds.shape[2])
    return Selection(index, values, owner, mark, torch.arange(k).flip(0).expand(batch, -1))


def test_views_are_selected_apart_and_joined() -> None:
    """Statement: indices, values, owners, scores and order of every view land at its own tokens, thumbnail to last
    crop.
    """
    layout = anyres((1, 3), [2], [2, 1])  # tokens 0-2; canvas rows 3 4 | 5 and 6 7 | 8
    tokens = make_tokens(layout, 2, 0)
    mark = torch.arange(9.0) + torch.tensor([[100.0], [200.0]])
    joined = per_view(tokens, (2, 3, 1), first, mark=mark)
    assert joined.index.tolist() == [[0, 1, 3, 4, 5, 6]] * 2
    assert joined.values[..., 0].tolist() == [[100, 101, 103, 104, 105, 106], [200, 201, 203, 204, 205, 206]]
    assert torch.equal(joined.scores, mark)
    assert joined.owner.tolist() == [[0, 1, 1, 3, 4, 5, 6, 6, 5]] * 2
    assert joined.index.gather(1, joined.order).tolist() == [[1, 0, 6, 4, 3, 5]] * 2


def test_full_views_are_left_alone() -> None:
    """Statement: a view with a full budget keeps its tokens' own values and owners, one without budget loses all."""
    layout = Layout.video(3, 1, 2)
    tokens = make_tokens(layout, 1, 0)
    joined = per_view(tokens, (2, 0, 1), first, mark=torch.full((1, 6), 7.0))
    assert joined.index.tolist() == [[0, 1, 4]]
    assert torch.equal(joined.values[0, :2], tokens.embeds[0, :2])
    assert joined.values[0, 2].tolist() == [7.0] * 6
    assert joined.owner.tolist() == [[0, 1, -1, -1, 4, 4]]
    assert joined.index.gather(1, joined.order).tolist() == [[0, 1, 4]]


def test_views_enter_in_their_own_sequence() -> None:
    """Statement: views that are selected as one batch still enter where they stand among the others."""
    joined = per_view(make_tokens(Layout.video(3, 1, 3), 1, 0), (1, 2, 1), first, mark=torch.zeros(1, 9))
    assert joined.index.gather(1, joined.order).tolist() == [[0, 4, 3, 6]]


def test_views_of_one_shape_share_a_batch() -> None:
    """Statement: views are not processed one at a time."""
    calls = []

    def select(tokens: Tokens, k: int) -> Selection:
        calls.append(len(tokens.embeds))
        return Selection(torch.arange(k).expand(len(tokens.embeds), -1))

    per_view(make_tokens(Layout.video(5, 2, 2), 3, 0), (2,) * 5, select)
    assert calls == [15]


def test_per_view_signals_reach_their_view() -> None:
    """Statement: a signal that is named as one with a row per view is handed out by view, whatever its shape."""
    seen = []

    def select(tokens: Tokens, k: int, name: torch.Tensor) -> Selection:
        seen.append(name.flatten().tolist())
        return Selection(torch.arange(k).expand(len(tokens.embeds), -1))

    names = torch.tensor([[[0.0], [1.0], [2.0]], [[10.0], [11.0], [12.0]]])
    per_view(make_tokens(Layout.video(3, 2, 2), 2, 0), (1, 2, 1), select, ("name",), name=names)
    assert seen == [[0.0, 2.0, 10.0, 12.0], [1.0, 11.0]]


def test_view_ids_are_unlike_all_others() -> None:
    """Statement: no view of an image has the id of another view or image, also in the 32 bits that a CPU generator
    uses.
    """
    views = [view_id(sample, view) for sample in range(200) for view in range(7)]
    assert len({i % 2**32 for i in (*views, *range(1000))}) == len(views) + 1000
    # SplitMix64 from seed 1234567, as its reference implementation prints it
    assert [view_id(1234567, view) for view in range(2)] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("ids", [(7, 8), ()])
def test_views_have_ids_of_their_own(ids: tuple[int, ...]) -> None:
    """Statement: each view has its id in whatever group or batch it is selected; an only view goes by its image's."""
    seen: list[tuple[int, ...]] = []

    def select(tokens: Tokens, k: int) -> Selection:
        seen.append(tokens.sample_ids)
        return Selection(torch.arange(k).expand(len(tokens.embeds), -1))

    tokens = make_tokens(anyres((1, 3), [2], [2, 2]), 2, 0)
    tokens.sample_ids = ids
    per_view(tokens, (2, 3, 3), select)
    first, second = ids or (0, 1)
    crops = tuple(view_id(sample, view) for sample in (first, second) for view in (1, 2))
    assert seen == [(view_id(first, 0), view_id(second, 0)), crops]
    tokens = make_tokens(Layout.grid(2, 2), 2, 0)
    tokens.sample_ids = ids
    per_view(tokens, (2,), select)
    assert seen[2] == ids


def test_padded_views_pad_the_joint_index() -> None:
    """Statement: views with content-dependent counts join into rows padded on the right with -1."""

    def select(tokens: Tokens, k: int) -> Selection:
        index = torch.tensor([[1, -1], [0, 1], [0, 2], [2, -1]])
        return Selection(index[: len(tokens.embeds)])

    joined = per_view(make_tokens(Layout.video(2, 1, 3), 2, 0), (2, 2), select)
    assert joined.index.tolist() == [[1, 3, 4, -1], [0, 2, 5, -1]]


def test_as_many_views_as_tokens_are_no_riddle() -> None:
    """Statement: what has one row per view is told by its name, also where there are as many views as tokens."""
    layout = anyres((1, 2), [0], [1])  # a crop that is all padding

    def select(tokens: Tokens, k: int, mine: torch.Tensor, name: torch.Tensor) -> Selection:
        assert mine.tolist() == [[5.0, 6.0]]
        assert name.tolist() == [[7.0]]
        return Selection(torch.tensor([[1]]))

    mine, names = torch.tensor([[5.0, 6.0]]), torch.tensor([[[7.0], [8.0]]])
    joined = per_view(make_tokens(layout, 1, 0), (1, 0), select, ("name",), mine=mine, name=names)
    assert joined.index.tolist() == [[1]]
