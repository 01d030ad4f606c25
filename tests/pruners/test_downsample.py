"""Downsample: smaller pixels, and where their features stand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from foveate.errors import BudgetError, InputError, UnsupportedModelError
from foveate.pruners import AtEntry, AtPixels, Downsample, Grid, Layout, ModelInfo
from foveate.pruners.core.lattice import lattice
from tests.pruners.synthetic import QWEN, anyres, make_tokens


def test_downsample_shrinks_pixels_to_the_lattice() -> None:
    """Statement: the tower sees exactly gr x gc patches; a flat picture stays flat, brightness and dtype are kept."""
    model = ModelInfo(family="llava", patch_size=4)
    pixels, tokens = Downsample(keep=6).stages(model)
    assert (type(pixels), type(tokens)) == (AtPixels, AtEntry)
    small = pixels.select(torch.full((2, 3, 16, 16), 0.25, dtype=torch.bfloat16))
    assert lattice((4, 4), 6) == (2, 3)
    assert small.shape == (2, 3, 8, 12)
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(small, torch.full_like(small, 0.25))
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(pixels.select(ramp).mean(), ramp.mean(), atol=0.01, rtol=0)


def test_downsample_hosts_the_features_on_the_grid() -> None:
    """Statement: the fewer features, which come first, move to the slots of the grid baseline."""
    tokens = make_tokens(Layout.grid(4, 4), 2, 0)
    tokens.embeds[:, 6:] = 0
    chosen = Downsample(keep=6).select(tokens)
    assert torch.equal(chosen.index, Grid(keep=6).select(tokens).index)
    assert torch.equal(chosen.values, tokens.embeds[:, :6])


def test_downsample_notices_another_number_of_patches() -> None:
    """Statement: a tower that did not shrink as asked is an error, not a wrong picture."""
    with pytest.raises(InputError, match=r"for 6 patches.*returned 16"):
        Downsample(keep=6).select(make_tokens(Layout.grid(4, 4), 1, 0))


def test_downsample_of_any_resolution_resizes_the_picture() -> None:
    """Statement: Qwen families have no stage; ``prepare`` scales each side by sqrt(keep), and needs a fraction."""
    assert Downsample().stages(QWEN) == ()
    assert Downsample(keep=0.25).prepare(Image.new("RGB", (100, 61))).size == (50, 30)
    assert Downsample(keep=1.0).prepare(Image.new("RGB", (7, 9))).size == (7, 9)
    with pytest.raises(BudgetError, match="fraction"):
        Downsample(keep=64).prepare(Image.new("RGB", (100, 61)))


def test_downsample_refuses_crops() -> None:
    """Statement: families that cut pictures into crops are named as unsupported, with alternatives."""
    with pytest.raises(UnsupportedModelError, match="llava_next; use avgpool or grid"):
        Downsample().stages(ModelInfo(family="llava_next"))
    with pytest.raises(UnsupportedModelError, match="3"):
        Downsample().count(anyres((2, 2), [2], [2, 2]))
