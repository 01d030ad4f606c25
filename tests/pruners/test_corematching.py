"""CoreMatching's knee, bounds and refusals."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import BudgetError, ParameterError
from foveate.pruners import BeforeLayer, CoreMatching, FastV, Layout, ModelInfo, Then
from foveate.pruners.corematching import above_knee, knee
from tests.pruners.synthetic import CLIP, make_tokens

BAD = [
    ({"beta": 0.0}, ParameterError, "beta=0.0"),
    ({"beta": 1.2}, ParameterError, "beta=1.2"),
    ({"beta": -1}, ParameterError, "beta=-1"),
    ({"rho": 0}, ParameterError, "rho=0"),
    ({"rho": float("nan")}, ParameterError, "rho=nan"),
    ({"beta": "half"}, ParameterError, "beta='half'"),
    ({"topk": "max"}, ParameterError, "'max'"),
    ({"threshold": "<"}, ParameterError, "'<'"),
    ({"mode": "fast"}, ParameterError, "'fast'"),
    ({"budget": 0}, BudgetError, "0"),
    ({"min_keep": 5, "max_keep": 3}, BudgetError, "min_keep=5"),
    ({"max_keep": 0}, BudgetError, "max_keep=0"),
]


@pytest.mark.parametrize(("values", "error", "says"), BAD)
def test_bad_parameters_are_refused(values: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CoreMatching(**values)


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(ParameterError, match="select_layer"):
        CoreMatching(select_layer=31).stages(CLIP)
    with pytest.raises(ParameterError, match="neuron_layers=32"):
        CoreMatching(neuron_layers=(6, 32)).stages(CLIP)
    with pytest.raises(ParameterError, match=r"layers 5 \.\. 18"):
        CoreMatching(mode="released").stages(ModelInfo(decoder_layers=4))


def by_hand(counts: list[int]) -> int:
    """Place of the knee, in float64 with the usual distance formula."""
    curve = sorted(counts, reverse=True)
    n, first, last = len(curve) - 1, curve[0], curve[-1]
    far = [abs(n * (y - first) - i * (last - first)) for i, y in enumerate(curve)]
    return far.index(max(far))


def test_the_knee_is_the_farthest_point_from_the_chord() -> None:
    """Statement: integer distances, first maximum, for convex, concave and flat curves alike, sample by sample."""
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 500, (20, 33), generator=g)
    counts[0], counts[1], counts[2] = 7, torch.arange(33), (torch.arange(33) - 40).square()
    place, value = knee(counts)
    assert place.tolist() == [by_hand(row) for row in counts.tolist()]
    assert value.tolist() == [sorted(row, reverse=True)[i] for row, i in zip(counts.tolist(), place.tolist())]


def test_short_and_flat_curves() -> None:
    """Statement: equal counts keep all (>=) or none (>); a single token stays; none is none."""
    flat = torch.full((1, 4), 3)
    assert above_knee(flat).all()
    assert not above_knee(flat, ">").any()
    assert above_knee(torch.tensor([[5]]), ">").all()
    assert above_knee(torch.tensor([[5, 2]])).tolist() == [[True, False]]
    assert above_knee(torch.empty(1, 0, dtype=torch.long)).shape == (1, 0)


def kept(method: CoreMatching, counts: list[int]) -> list[int]:
    tokens = make_tokens(Layout.grid(1, len(counts)), 1, 0)
    index = method.core_tokens(tokens, torch.tensor([counts])).index[0]
    return index[index >= 0].tolist()


def test_bounds_and_budget() -> None:
    """Statement: bounds and budget take the largest counts, of equal ones the lower index."""
    counts = [3, 9, 3, 3, 9, 1]
    assert kept(CoreMatching(threshold=">", min_keep=0), [3, 3]) == []
    assert kept(CoreMatching(threshold=">"), [3, 3]) == [0]
    assert kept(CoreMatching(min_keep=3), counts)[:3] == [0, 1, 2] or len(kept(CoreMatching(min_keep=3), counts)) >= 3
    assert kept(CoreMatching(max_keep=1), counts) == [1]
    assert kept(CoreMatching(budget=3), counts) == [0, 1, 4]
    assert kept(CoreMatching(budget=0.5), counts) == [0, 1, 4]
    assert CoreMatching().count(Layout.grid(2, 3)) is None
    assert CoreMatching(budget=3).count(Layout.grid(2, 3)) == 3
    assert CoreMatching(budget=64).count(Layout.grid(1, 576)) == 64


@pytest.mark.parametrize("without", [{"select_layer": None}, {"mode": "released"}])
def test_no_budget_where_no_token_goes(without: dict) -> None:
    """Statement: a budget that could drop nothing is refused, not forgotten."""
    assert CoreMatching(**without).count(Layout.grid(1, 576)) == 576
    with pytest.raises(ParameterError, match=r"budget=0\.5.*keeps all tokens"):
        CoreMatching(**without, budget=0.5)


def test_reading_neurons_does_not_stand_in_the_way_of_composition() -> None:
    """Statement: a later method may follow core tokens although every MLP is read; one in front of them may not."""
    stages = Then(CoreMatching(), FastV(k=5)).stages(CLIP)
    assert [s.layer for s in stages if isinstance(s, BeforeLayer)] == [2, 5]
    with pytest.raises(ParameterError, match="not after"):
        Then(FastV(k=5), CoreMatching()).stages(CLIP)
