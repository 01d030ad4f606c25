"""Every failure foveate reports. Import-light, so that every folder may raise them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AttachError",
    "BudgetError",
    "FoveateError",
    "InputError",
    "MissingSignalError",
    "NotUnderstoodError",
    "ParameterError",
    "StoreError",
    "UnknownNameError",
    "UnsupportedModelError",
]


class FoveateError(Exception):
    """Base class: the message says what was wrong, with the value, where, and what to do."""


class BudgetError(FoveateError, ValueError):
    """A token budget that no sequence can meet (zero, negative, not a number, …)."""


class ParameterError(FoveateError, ValueError):
    """A method parameter, option or input with an unusable value."""


class UnknownNameError(FoveateError, LookupError):
    """A method, parameter, suite or family that does not exist."""


class StoreError(FoveateError, ValueError):
    """A result file that cannot be used, or results that do not belong into one table."""


class UnsupportedModelError(FoveateError, TypeError):
    """A model that no adapter knows, or a part of it that a method needs and it lacks."""


class MissingSignalError(UnsupportedModelError):
    """The model cannot provide a signal that the method reads."""


class NotUnderstoodError(UnsupportedModelError):
    """The transformers at hand does something otherwise than any version that is known; nothing was answered."""


class AttachError(FoveateError, RuntimeError):
    """Attaching, detaching or calling in the wrong order."""


class InputError(FoveateError, ValueError):
    """Model inputs that cannot be pruned (NaN pixels, chunked prefill, unsupported masks, …)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that lists ``known`` and, where one is close to ``name``, suggests it."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
