"""The methods, one file per published method."""

from foveate.pruners.base import Hook, Layout, ModelInfo, Pruner, Selection, Stage, Tokens, View
from foveate.pruners.registry import PRUNERS, create, find, register

__all__ = [
    "PRUNERS",
    "Hook",
    "Layout",
    "ModelInfo",
    "Pruner",
    "Selection",
    "Stage",
    "Tokens",
    "View",
    "create",
    "find",
    "register",
]
