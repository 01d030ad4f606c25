"""FastV: where it acts, and what it counts."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import ParameterError
from foveate.pruners import BeforeLayer, FastV, Layout
from foveate.pruners.core.signals import LastTokenAttention
from tests.pruners.synthetic import CLIP, make_tokens


def test_fastv_acts_behind_the_layer_it_reads() -> None:
    """Statement: layers 0 .. K - 1 see everything, layer K - 1's last row decides, positions stay."""
    (stage,) = FastV(k=3).stages(CLIP)
    assert (type(stage), stage.layer, stage.positions) == (BeforeLayer, 3, "keep")
    assert dict(stage.signals) == {"attention": LastTokenAttention(2)}


def test_fastv_counts_what_is_there() -> None:
    """Statement: a fraction counts the tokens that reach the layer (half to even), ties go to lower indices."""
    tokens = make_tokens(Layout.grid(3, 3), 1, 0)
    tokens.embeds = tokens.embeds[:, :5]  # four are gone already
    chosen = FastV().select(tokens, attention=torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.0]]))
    assert chosen.index.tolist() == [[1, 2]]


@pytest.mark.parametrize("k", [0, 32])
def test_fastv_needs_a_layer_before_and_behind(k: int) -> None:
    """Statement: a cut before layer 1 or behind the last layer is refused."""
    with pytest.raises(ParameterError, match=f"k={k}"):
        FastV(k=k).stages(CLIP)
