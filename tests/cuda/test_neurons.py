"""Neuron counts, core sets and matches against their definitions, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate.cuda.neurons as neurons
from foveate.cuda import core_neurons, match_counts, neuron_counts
from foveate.errors import ParameterError


def by_definition(hidden: Tensor, rho: float, valid: Tensor, topk: str) -> Tensor:
    """Python over tokens, ties to the lower index."""
    counts = torch.zeros(hidden.shape[0], hidden.shape[2], dtype=torch.long)
    for b, rows in enumerate(hidden):
        rows = rows[valid[b]]
        common = int(rho * int((rows > 0).sum()) / max(len(rows), 1))
        for row in rows:
            k = common if topk == "mean" else int(rho * int((row > 0).sum()))
            counts[b, row.argsort(descending=True, stable=True)[:k]] += 1
    return counts


@pytest.mark.parametrize("topk", ["mean", "per_token"])
@pytest.mark.parametrize("rho", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_counts_are_their_definition(topk: str, rho: float, coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: counts equal the definition, with ties, with tokens that do not count and over several blocks."""
    monkeypatch.setattr(neurons, "_CPU_BLOCK_ELEMENTS", 200)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 11, 30, generator=g)
    if coarse:
        hidden = (hidden * 2).round() / 2
    valid = torch.rand(2, 11, generator=g) > 0.3
    assert torch.equal(neuron_counts(hidden, rho, valid=valid, topk=topk), by_definition(hidden, rho, valid, topk))


def test_prompts_without_active_neurons_have_no_core() -> None:
    """Statement: neurons that nothing counted are never core, even where the budget has room."""
    hidden = -torch.ones(1, 3, 10)
    counts = neuron_counts(hidden, 0.5)
    assert int(counts.sum()) == 0
    assert not core_neurons(counts, 1.0).any()


def test_core_takes_the_largest_counts_and_the_lower_index() -> None:
    counts = torch.tensor([[3, 0, 5, 3, 3, 0]])
    assert core_neurons(counts, 0.5).nonzero()[:, 1].tolist() == [0, 2, 3]
    assert core_neurons(counts, 1.0).nonzero()[:, 1].tolist() == [0, 2, 3, 4]


def test_match_counts() -> None:
    """Statement: a token's count is the size of the intersection of its active neurons and the set."""
    g = torch.Generator().manual_seed(4)
    active, core = torch.rand(2, 5, 40, generator=g) > 0.5, torch.rand(2, 40, generator=g) > 0.6
    expected = [[int((row & core[b]).sum()) for row in active[b]] for b in range(2)]
    found = match_counts(active, core)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_unknown_rule() -> None:
    with pytest.raises(ParameterError, match="median"):
        neuron_counts(torch.ones(1, 1, 1), 0.2, topk="median")


def test_layout_of_activations_does_not_matter() -> None:
    """Statement: permuted activations with ties count like contiguous ones."""
    hidden = torch.randint(0, 3, (2, 12, 5), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(neuron_counts(hidden.mT, 0.5), neuron_counts(hidden.mT.contiguous(), 0.5))
