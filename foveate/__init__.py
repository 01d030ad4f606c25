"""foveate: interchangeable visual-token pruners and mergers for the vision-language models you already have."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

__version__ = "0.1.0"

# In a source checkout the sub-packages stand at the repository root, beside this folder.
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "pruners").is_dir():
    __path__.append(str(_root))

_HOME = {
    "attach": "foveate.adapters",
    "Session": "foveate.adapters",
    "Trace": "foveate.adapters",
    "FoveateError": "foveate.errors",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use: ``import foveate`` itself loads neither torch nor transformers."""
    if name.startswith("_"):
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    home = importlib.import_module(_HOME.get(name, "foveate.pruners"))
    try:
        value = getattr(home, name)
    except AttributeError:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}") from None
    globals()[name] = value
    return value
