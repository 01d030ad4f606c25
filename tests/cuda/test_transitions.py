"""The transition operation against its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from foveate.cuda import transition_score
from foveate.errors import ParameterError


@pytest.mark.parametrize("direction", ["signed", "abs"])
def test_transition_score_is_its_formula(direction: str) -> None:
    """Statement: the score is ``|out| / |in| * exp(1 - cos)``, signed or absolute; the second result is its ``exp``."""
    g = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 7, 16, generator=g), torch.randn(2, 7, 16, generator=g)
    cosine = cosine_similarity(before, after, dim=-1)
    turn = torch.exp(1 - (cosine.abs() if direction == "abs" else cosine))
    score, share = transition_score(before, after, direction=direction)
    torch.testing.assert_close(share, turn)
    torch.testing.assert_close(score, after.norm(dim=-1) / before.norm(dim=-1) * turn)


def test_zero_rows_and_low_precision() -> None:
    """Statement: zero rows (padding) give finite numbers, and bfloat16 is judged in float32."""
    g = torch.Generator().manual_seed(1)
    before, after = torch.randn(1, 4, 8, generator=g), torch.randn(1, 4, 8, generator=g)
    before[0, 0] = after[0, 1] = 0
    assert all(x.isfinite().all() for x in transition_score(before, after))
    low = transition_score(before.bfloat16(), after.bfloat16())
    exact = transition_score(before.bfloat16().float(), after.bfloat16().float())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(low, exact))


def test_unknown_direction() -> None:
    with pytest.raises(ParameterError, match="sideways"):
        transition_score(torch.ones(1, 1, 1), torch.ones(1, 1, 1), direction="sideways")
