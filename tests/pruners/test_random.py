"""Random: the draw, its views, and the control for FastV."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.errors import ParameterError
from foveate.pruners import (
    FastV,
    Layout,
    Random,
    Tokens,
)
from tests.pruners.synthetic import CLIP, anyres, make_tokens


def test_random_depends_on_seed_and_image_alone() -> None:
    """Statement: the draw follows the image through batches and changes with the seed."""
    tokens = make_tokens(Layout.grid(8, 8), 3, 0)
    index = Random(keep=10).select(tokens).index
    swapped = Tokens(tokens.embeds * 2, tokens.layout, tokens.sample_ids[::-1])
    assert torch.equal(Random(keep=10).select(swapped).index, index.flip(0))
    assert not torch.equal(Random(keep=10, seed=1).select(tokens).index, index)
    assert len({tuple(row) for row in index.tolist()}) == 3


def test_random_is_uniform() -> None:
    """Statement: over many images every token is kept about equally often."""
    tokens = Tokens(torch.zeros(2000, 12, 1), Layout.grid(3, 4), tuple(range(2000)))
    counts = Random(keep=4).select(tokens).index.flatten().bincount(minlength=12)
    assert (counts - 2000 / 3).abs().max() < 5 * math.sqrt(2000 * 2 / 9)


def test_random_draws_views_apart() -> None:
    """Statement: thumbnail and crops are drawn separately with the same ratio."""
    layout = anyres((4, 4), [4], [4, 2])
    assert Random(keep=0.25).budgets(layout) == (4, 4, 2)
    assert Random(keep=5).budgets(layout) == (2, 2, 1)
    index = Random(keep=0.25).select(make_tokens(layout, 1, 0)).index[0]
    local = [torch.isin(view.tokens(), index).nonzero().flatten().tolist() for view in layout.views]
    assert [len(part) for part in local] == [4, 4, 2]
    assert local[0] != local[1]


def test_random_draws_images_of_several_views_apart() -> None:
    """Statement: no view draws like one of another image, and a view's draw does not depend on the batch."""
    frames, picture = Layout.video(2, 8, 8), Layout.grid(8, 8)

    def draw(layout: Layout, *ids: int) -> Tensor:
        tokens = Tokens(torch.zeros(len(ids), layout.size, 1), layout, ids)
        return Random(keep=0.25).select(tokens).index.view(len(ids), len(layout.views), 16) % 64

    drawn = torch.cat([draw(frames, *range(5)).flatten(0, 1), draw(picture, *range(12)).flatten(0, 1)])
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn) == 22
    assert torch.equal(draw(frames, 3), draw(frames, 0, 3)[1:])


def test_random_shuffles_on_request() -> None:
    """Statement: the same tokens are kept, in another order."""
    tokens = make_tokens(Layout.grid(6, 6), 1, 0)
    plain, shuffled = Random(keep=12).select(tokens), Random(keep=12, shuffle=True).select(tokens)
    assert torch.equal(plain.index, shuffled.index)
    assert plain.order is None
    assert not torch.equal(shuffled.order, torch.arange(12)[None])


def test_random_is_the_control_for_fastv() -> None:
    """Statement: at a layer it acts where and on as many tokens as FastV, with crops and survivors of other stages."""
    (control,), (fastv,) = Random(layer=3).stages(CLIP), FastV(k=3).stages(CLIP)
    assert (type(control), control.layer, control.positions) == (type(fastv), fastv.layer, fastv.positions)
    assert not control.signals
    layout = anyres((3, 3), [3], [3, 2])
    tokens = make_tokens(layout, 2, 0)
    for count in (layout.size, 11):
        tokens.embeds = tokens.embeds[:, :count]
        for keep in (0.25, 0.5, 1.0, 7):
            chosen = Random(keep=keep, layer=3).select(tokens)
            assert (
                chosen.index.shape == FastV(keep=keep, k=3).select(tokens, attention=torch.rand(2, count)).index.shape
            )
            assert (chosen.index.diff(dim=1) > 0).all()
            assert chosen.order is None
            assert int(chosen.index.max()) < count
    assert Random(keep=0.3, layer=3).budgets(layout) == FastV(keep=0.3, k=3).budgets(layout)


def test_random_at_a_layer_follows_the_image() -> None:
    """Statement: the draw depends on seed and image id there, too, and is made over all crops together."""
    tokens = make_tokens(anyres((4, 4), [4], [4, 4]), 3, 0)
    index = Random(keep=12, layer=2).select(tokens).index
    swapped = Tokens(tokens.embeds, tokens.layout, tokens.sample_ids[::-1])
    assert torch.equal(Random(keep=12, layer=2).select(swapped).index, index.flip(0))
    assert not torch.equal(Random(keep=12, layer=2, seed=1).select(tokens).index, index)
    assert len({tuple(row) for row in index.tolist()}) == 3


def test_random_needs_a_layer_before_and_behind() -> None:
    """Statement: layer 0, a layer the decoder does not have, and shuffling inside it are refused."""
    with pytest.raises(ParameterError, match="layer=0"):
        Random(layer=0)
    with pytest.raises(ParameterError, match=r"layer=32.*1 \.\. 31"):
        Random(layer=32).stages(CLIP)
    with pytest.raises(ParameterError, match=r"shuffle.*layer=2"):
        Random(layer=2, shuffle=True)
