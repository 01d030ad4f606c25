"""Grid: lattices and strides."""

from __future__ import annotations

import math

import pytest

from foveate.errors import ParameterError
from foveate.pruners import (
    Grid,
    Layout,
)
from foveate.pruners.core.lattice import middles
from tests.pruners.synthetic import make_tokens


def test_lattice_positions() -> None:
    """Statement: row i stands at ``floor((i + 1/2) rows / gr)``, columns alike, in raster order."""
    assert middles(24, 5).tolist() == [math.floor((i + 0.5) * 24 / 5) for i in range(5)]
    assert Grid(keep=4).select(make_tokens(Layout.grid(4, 6), 1, 0)).index.tolist() == [[7, 10, 19, 22]]


def test_lattice_counts_are_real() -> None:
    """Statement: the count reported is that of the lattice, not the budget."""
    assert Grid(keep=7).count(Layout.grid(4, 4)) == 6  # no 7-token lattice fits 4 rows and columns
    assert Grid(keep=7).count(Layout.grid(1, 16)) == 7  # of as many tokens in one row


def test_stride_is_exact() -> None:
    """Statement: the one-axis variant keeps exactly k, evenly spaced in raster order."""
    tokens = make_tokens(Layout.grid(4, 5), 1, 0)
    index = Grid(keep=7, variant="stride").select(tokens).index[0].tolist()
    assert index == [math.floor((i + 0.5) * 20 / 7) for i in range(7)]
    assert Grid(keep=7, variant="stride").count(Layout.grid(1, 20)) == 7


def test_bad_parameters_are_named() -> None:
    """Statement: an unknown choice is refused with its value."""
    with pytest.raises(ParameterError, match="hex"):
        Grid(variant="hex")
