"""AvgPool: what a bin covers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveate.errors import ParameterError
from foveate.pruners import (
    AvgPool,
    Layout,
)
from foveate.pruners.core.lattice import lattice
from tests.pruners.synthetic import make_tokens


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize(("grid", "k"), [((6, 4), 6), ((5, 7), 6), ((3, 8), 5), ((4, 4), 1)])
def test_pooling_bins(pool: str, grid: tuple[int, int], k: int) -> None:
    """Statement: bin i covers rows floor(i rows / gr) .. ceil((i + 1) rows / gr) exclusive, columns alike."""
    (rows, cols), small = grid, lattice(grid, k)
    tokens = make_tokens(Layout.grid(*grid), 2, 0)
    chosen = AvgPool(keep=k, pool=pool).select(tokens)
    picture = tokens.embeds.unflatten(1, grid)

    def span(i: int, n: int, m: int) -> slice:
        return slice(math.floor(i * n / m), math.ceil((i + 1) * n / m))

    for j, (r, c) in enumerate(itertools.product(range(small[0]), range(small[1]))):
        cell = picture[:, span(r, rows, small[0]), span(c, cols, small[1])].flatten(1, 2)
        torch.testing.assert_close(chosen.values[:, j], cell.mean(dim=1) if pool == "mean" else cell.amax(dim=1))


def test_bad_parameters_are_named() -> None:
    """Statement: an unknown choice is refused with its value."""
    with pytest.raises(ParameterError, match="sum"):
        AvgPool(pool="sum")
