"""foveate: interchangeable visual-token pruners and mergers for the vision-language models you already have.

    import foveate

    with foveate.attach(model, foveate.HiPrune(keep=1 / 9)) as session:
        out = model.generate(**inputs, max_new_tokens=64)

Public are ``attach``, ``Session`` and ``Trace``, ``FrameScorer`` and ``read_video`` for videos, the errors
(``FoveateError`` is the base of all) and every method by its class name. They load on first use: ``import foveate``
itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os.path
from typing import TYPE_CHECKING, Any

from foveate import moved

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foveate.adapters import FrameScorer as FrameScorer
    from foveate.adapters import Session as Session
    from foveate.adapters import Trace as Trace
    from foveate.adapters import attach as attach
    from foveate.adapters import read_video as read_video
    from foveate.errors import *
    from foveate.pruners import *

# In a source checkout the sub-packages stand at the repository root, beside this folder.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "setup.cfg")) and os.path.isdir(os.path.join(_root, "pruners")):
    __path__.append(_root)

moved.install()

_HOME = {
    "attach": "foveate.adapters",
    "read_video": "foveate.adapters",
    "FrameScorer": "foveate.adapters",
    "Session": "foveate.adapters",
    "Trace": "foveate.adapters",
    "FoveateError": "foveate.errors",
    "AttachError": "foveate.errors",
    "BudgetError": "foveate.errors",
    "InputError": "foveate.errors",
    "MissingSignalError": "foveate.errors",
    "NotUnderstoodError": "foveate.errors",
    "ParameterError": "foveate.errors",
    "StoreError": "foveate.errors",
    "UnknownNameError": "foveate.errors",
    "UnsupportedModelError": "foveate.errors",
}
_METHODS = "foveate.pruners"  # home of every other public name
_SUBMODULES = ("adapters", "cli", "cuda", "demo", "errors", "eval_suites", "pruners")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"foveate.{name}")
    if not name.startswith("_"):
        home = importlib.import_module(_HOME.get(name, _METHODS))
        if name in getattr(home, "__all__", ()):  # what a sub-package merely imports is not public here
            value = globals()[name] = getattr(home, name)
            return value
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, methods included (so asking for them loads torch)."""
    return sorted({"__version__", *_HOME, *_SUBMODULES, *importlib.import_module(_METHODS).__all__})
