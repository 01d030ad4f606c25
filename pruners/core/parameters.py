"""Checks of the parameters that users pass: budgets, numbers, layers, one of several words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from foveate.errors import BudgetError, FoveateError, ParameterError

Keep = int | float


def check_keep(keep: Keep) -> Keep:
    """Return ``keep`` if it is a fraction in (0, 1] or an integer >= 1.

    Raises:
        BudgetError: it is not.
    """
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise BudgetError(
            f"keep={keep!r} is a {type(keep).__name__}; give a fraction in (0, 1] or a number of tokens >= 1"
        )
    if whole and keep < 1:
        raise BudgetError(f"keep={keep} tokens leaves no visual token; give at least 1, or a fraction in (0, 1]")
    if not whole and not (0.0 < keep <= 1.0):
        raise BudgetError(f"keep={keep} is no fraction in (0, 1]; for a number of tokens pass an int")
    return keep


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`ParameterError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ParameterError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def number(
    name: str, value: float, what: str, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """Return ``value`` if it is a finite number from ``low`` (``above``: not ``low`` itself) to ``high``; ``what`` it is of.

    Raises:
        ParameterError: it is not; the message names the parameter and the bounds.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        fits = False
    else:
        fits = (low < value if above else low <= value) and value <= high
    if not fits:
        raise ParameterError(f"{name}={value!r} is no {what}; give a number{_bounds(low, high, above)}")
    return value


def integer(
    name: str, value: int, what: str, low: int | None = None, error: type[FoveateError] = ParameterError
) -> int:
    """Return ``value`` if it is an int, at least ``low``; ``what`` it counts.

    Raises:
        ParameterError: (or the given ``error``) it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or (low is not None and value < low):
        raise error(f"{name}={value!r} is no {what}; give an int{'' if low is None else f' >= {low}'}")
    return value


def many(name: str, values: Iterable[Any], one: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Return ``values`` as a tuple if they are a sequence of what ``one`` accepts.

    Raises:
        ParameterError: they are not.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ParameterError(f"{name}={values!r} is no sequence of numbers; put a single one in brackets")
    return tuple(one(value) for value in values)


def layers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """Return ``values`` as a tuple if they are different ints; whether a model has such layers is for ``stages`` to say.

    Raises:
        ParameterError: they are not.
    """
    found = many(name, values, lambda value: integer(name, value, "layer's number"))
    if len(set(found)) < len(found):
        raise ParameterError(f"{name}={found} names a layer twice; name each once")
    return found


def _bounds(low: float, high: float, above: bool) -> str:
    parts = (
        []
        if low == -math.inf
        else [f"above {low:g}" if above else f"from {low:g}" if high < math.inf else f">= {low:g}"]
    )
    parts += [] if high == math.inf else [f"{'at most' if above or not parts else 'to'} {high:g}"]
    return " " + (", " if above else " ").join(parts) if parts else ""
