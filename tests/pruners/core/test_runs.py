"""Runs of dropped tokens."""

from __future__ import annotations

import pytest
import torch

from foveate.cuda import gather_tokens, run_mean
from foveate.pruners.core import Layout
from foveate.pruners.core.runs import runs, stretch_ends
from tests.pruners.synthetic import ROWS, STRETCHES, runs_by_hand


@pytest.mark.parametrize("layout", STRETCHES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_runs_are_maximal_and_stay_in_their_stretch(layout: Layout, share: float) -> None:
    """Statement: the same runs as token by token; one mean for each; places where the placement says."""
    g = torch.Generator().manual_seed(0)
    dropped = torch.rand(4, layout.size, generator=g) < share
    x = torch.randn(4, layout.size, 3, generator=g)
    gone = runs(dropped, layout)
    means = run_mean(x, gone.number, max(int(gone.counts.max()), 1))
    for b in range(4):
        expected = runs_by_hand(dropped[b].tolist(), layout)
        assert int(gone.counts[b]) == len(expected)
        assert (gone.number[b] >= 0).tolist() == dropped[b].tolist()
        for n, run in enumerate(expected):
            assert set(gone.number[b, run].tolist()) == {n}
            for placement, seat in (("first", run[0]), ("end", run[-1]), ("middle", (run[0] + run[-1]) // 2)):
                assert set(gone.marker_places(placement)[b, run].tolist()) == {seat}
            assert gone.marker_places("full")[b, run].tolist() == run
            torch.testing.assert_close(means[b, n], x[b, run].mean(dim=0))


def test_a_newline_ends_a_stretch() -> None:
    assert stretch_ends(ROWS).nonzero()[:, 0].tolist() == [3, 7, 11]
    assert stretch_ends(Layout.grid(3, 4)).nonzero()[:, 0].tolist() == [11], "rows of a plain grid run on"


def test_gathering_leaves_gaps_and_marks() -> None:
    """Statement: rows bit for bit, -1 is zero, marked rows are the marker, of any dtype and rank."""
    x = torch.arange(12).view(2, 3, 2)
    index, marked = torch.tensor([[2, -1], [0, 1]]), torch.tensor([[False, False], [True, False]])
    assert gather_tokens(x, index).tolist() == [[[4, 5], [0, 0]], [[6, 7], [8, 9]]]
    assert gather_tokens(x, index, marked=marked, marker=torch.tensor([-1, -2])).tolist()[1] == [[-1, -2], [8, 9]]
    assert gather_tokens(x[..., 0], index, marked=marked, marker=-100).tolist() == [[4, 0], [-100, 8]]
    assert gather_tokens(x > 5, index, marked=marked, marker=False).dtype == torch.bool
