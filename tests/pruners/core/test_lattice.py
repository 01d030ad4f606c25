"""Regular lattices: their size, and where their points stand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveate.pruners.core.lattice import host_slots, lattice, middles, nearest_host


def test_lattice_rule() -> None:
    """Statement: largest product within the budget, then nearest aspect ratio, then more rows; checked exhaustively."""
    for rows, cols, k in itertools.product(range(1, 8), range(1, 8), range(1, 50)):
        sizes = [(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1) if r * c <= k]
        most = max(r * c for r, c in sizes)
        expected = min((s for s in sizes if s[0] * s[1] == most), key=lambda s: (abs(s[0] / s[1] - rows / cols), -s[0]))
        assert lattice((rows, cols), k) == expected


@pytest.mark.parametrize(("k", "small"), [(144, (12, 12)), (64, (8, 8)), (192, (12, 16)), (128, (8, 16)), (32, (4, 8))])
def test_lattices_of_the_usual_budgets(k: int, small: tuple[int, int]) -> None:
    """Statement: what the usual budgets mean on 24 x 24 tokens: rows over columns nearest to one."""
    assert lattice((24, 24), k) == small


def test_pooled_tokens_stand_in_their_bins() -> None:
    """Statement: host slots are the grid baseline's, and the owner of each token is a host whose bin holds it."""
    for rows, cols, k in itertools.product(range(1, 9), range(1, 9), (1, 2, 3, 5, 8, 13, 21)):
        small = lattice((rows, cols), k)
        hosts, owner = host_slots((rows, cols), small), nearest_host((rows, cols), small)
        assert torch.equal(owner[hosts], hosts)
        for token, host in enumerate(owner.tolist()):
            for at, to, n, m in (
                (token // cols, host // cols, rows, small[0]),
                (token % cols, host % cols, cols, small[1]),
            ):
                i = middles(n, m).tolist().index(to)
                assert math.floor(i * n / m) <= at < math.ceil((i + 1) * n / m)
