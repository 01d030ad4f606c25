"""Statement: what 0.1 called modules still imports the same objects, and says where they are now."""

from __future__ import annotations

import importlib
import sys

import pytest

import foveate  # noqa: F401
from foveate.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_names_are_the_new_modules(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == MOVED[old]


def test_modules_inside_a_package_that_moved(monkeypatch):
    monkeypatch.delitem(sys.modules, "foveate.eval_suites.shapes.scenes", raising=False)
    with pytest.warns(DeprecationWarning, match="is now"):
        scenes = importlib.import_module("foveate.eval_suites.shapes.scenes")
    assert scenes is importlib.import_module("foveate.eval_suites.suites.shapes.scenes")


def test_other_names_are_still_missing():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("foveate.pruners.nothing")
