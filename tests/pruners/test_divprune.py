"""DivPrune against its definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.pruners import (
    DivPrune,
    Layout,
    Tokens,
)
from tests.pruners.synthetic import make_tokens


def divprune_by_definition(features: Tensor, k: int) -> list[int]:
    """Max-min diversity over the cosine distance matrix in float64, as the paper writes it."""
    x = normalize(features.double(), dim=-1)
    distance = 1 - x @ x.T
    distance = distance.triu() + distance.triu(1).T  # a pair has one distance, however (i, j) and (j, i) are rounded
    n = len(x)
    nearest = [min(float(distance[i, j]) for j in range(n) if j != i) for i in range(n)]
    chosen = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(float(distance[i, c]) for c in chosen), -i)))
    return chosen


def test_divprune_against_its_definition() -> None:
    """Statement: first the token whose nearest other token is farthest, then farthest from the nearest pick."""
    tokens = make_tokens(Layout.grid(5, 5), 3, 2)
    index = DivPrune(keep=9).select(tokens).index
    for b in range(3):
        assert index[b].tolist() == sorted(divprune_by_definition(tokens.embeds[b], 9))


def test_divprune_never_repeats_a_duplicate() -> None:
    """Statement: more picks than distinct tokens still gives distinct indices, lowest first."""
    embeds = torch.eye(3).repeat_interleave(3, dim=0)[None]  # three of each
    chosen = DivPrune(keep=5).select(Tokens(embeds, Layout.grid(3, 3), (0,)))
    assert chosen.index.tolist() == [[0, 1, 2, 3, 6]]


def test_divprune_takes_zero_tokens() -> None:
    """Statement: zero vectors are orthogonal to everything and give no NaN."""
    embeds = torch.zeros(1, 4, 3)
    embeds[0, 1] = torch.tensor([1.0, 0, 0])
    assert DivPrune(keep=2).select(Tokens(embeds, Layout.grid(2, 2), (0,))).index.tolist() == [[0, 1]]


def test_divprune_budget() -> None:
    """Statement: the published ratio 0.098 keeps 56 of 576."""
    assert DivPrune().count(Layout.grid(1, 576)) == 56
