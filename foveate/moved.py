"""Modules that 0.1 had elsewhere can still be imported by their old names, with a warning, until 0.3."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "pruners.core": "pruners: tokens signals parameters compose control preset lattice runs allocation resampling "
    "merging frame_questions patch_scorer ui_graph",
    "adapters.families": "adapters: base llava llava_next llava_onevision llava_original",
    "adapters.engine": "adapters: decoder",
    "eval_suites.suites": "eval_suites: questions streams shapes screens clips",
    "eval_suites.running": "eval_suites: runner meter models distributed environment compare tune certify timing "
    "cost budgets",
    "eval_suites.results": "eval_suites: store rows leaderboard page show",
}
MOVED = {
    "foveate.pruners.base": "foveate.pruners.core",
    "foveate.pruners.registry": "foveate.pruners.core.method",
    "foveate.adapters.overlay": "foveate.adapters.drawing",
    "foveate.pruners.baselines": "foveate.pruners",
    "foveate.adapters.frame_scorer": "foveate.adapters.video.frame_scorer",
    "foveate.cuda.bench": "foveate.eval_suites.speed.kernels",
    "foveate.eval_suites.clock": "foveate.eval_suites.speed.harness",
    "foveate.eval_suites.speed_serving": "foveate.eval_suites.speed.serving",
    "foveate.eval_suites.speed_vit": "foveate.eval_suites.speed.vit",
}
"""Old name -> new name."""

for _room, _text in _ROOMS.items():
    _old, _, _names = _text.partition(": ")
    MOVED.update({f"foveate.{_old}.{name}": f"foveate.{_room}.{name}" for name in _names.split()})


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parts = name.split(".") if name.startswith("foveate.") else []
        for stop in range(len(parts), 1, -1):  # what lies inside a package that moved has moved with it
            new = MOVED.get(".".join(parts[:stop]))
            if new is not None:
                return ModuleSpec(name, _Loader(".".join([new, *parts[stop:]])))
        return None


class _Loader(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> Any:
        return None

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(f"{module.__name__} is now {self.new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(self.new)


def install() -> None:
    """Let the import system know. Calling it again does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # a package that moved would find its parts a second time
