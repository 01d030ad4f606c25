"""Fixtures that put something else in the place of a GPU."""

from __future__ import annotations

import pytest

from foveate.cuda import dispatch, launch
from tests.cuda import shim


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run their kernels, and nothing but kernels, on CPU tensors."""
    if shim.MISSING:
        pytest.skip(shim.MISSING)
    monkeypatch.setattr(launch, "_execute", shim.execute)
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device: True)
    monkeypatch.setenv("FOVEATE_KERNELS", "cupy")
