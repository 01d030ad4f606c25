"""Parameters of methods, checked where they are declared: ``alpha: float = number(0.1, "share", 0, 1)``.

The first functions here are defaults of dataclass fields. :func:`check` holds every field of a method to what it was
declared as; a field typed ``Keep`` is held to :func:`check_keep` by itself. None passes where the type or the default
says so.

The ``check_…`` functions return the value, maybe in another form, and raise :class:`ParameterError`
(:class:`BudgetError` for budgets) with a message that names the parameter and says what fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from foveate.errors import BudgetError, FoveateError, ParameterError

Keep = int | float
"""A budget: a fraction in (0, 1] or a number of tokens >= 1."""

Check = Callable[[str, Any], Any]
"""``check(name, value)``: the value, maybe in another form; raises a :class:`FoveateError` that names the parameter."""


def check(parameters: Any) -> None:
    """Hold the fields of a dataclass to what they were declared as."""
    for one in dataclasses.fields(parameters):
        given = getattr(parameters, one.name)
        how: Check | None = one.metadata.get("check")
        if how is None and str(one.type).startswith("Keep"):
            how = check_keep
        if how is None or (given is None and "None" in f"{one.type} {one.default}"):
            continue
        value = how(one.name, given)
        if value is not given:
            object.__setattr__(parameters, one.name, value)


def parameter(default: Any, how: Check, **options: Any) -> Any:
    """What ``how`` accepts; ``options`` are those of ``dataclasses.field``."""
    return dataclasses.field(default=default, metadata={"check": how}, **options)


def number(
    default: float | None, what: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> Any:
    """A finite number from ``low`` (``above``: not ``low`` itself) to ``high``; ``what`` it is."""
    return parameter(default, lambda name, value: check_number(name, value, what, low, high, above=above))


def integer(default: Any, what: str, low: int | None = None, *, error: type[FoveateError] = ParameterError) -> Any:
    """An int, at least ``low``; ``what`` it counts."""
    return parameter(default, lambda name, value: check_integer(name, value, what, low, error=error))


def choice(default: str | None, *allowed: str, otherwise: Check | dataclasses.Field[Any] | None = None) -> Any:
    """One of several words, or, where it is not a word, what ``otherwise`` accepts."""

    def how(name: str, value: Any) -> Any:
        words = otherwise is None or isinstance(value, str)
        return check_choice(name, value, allowed) if words else _check_of(otherwise)(name, value)

    return parameter(default, how)


def several(default: Iterable[Any] | None, one: Check | dataclasses.Field[Any]) -> Any:
    """A sequence of what ``one`` accepts, a check or a parameter."""
    return parameter(default, lambda name, value: check_many(name, value, lambda x: _check_of(one)(name, x)))


def one_or_several(default: Any, one: Check | dataclasses.Field[Any]) -> Any:
    """What ``one`` accepts, a check or a parameter, or a sequence of that."""

    def how(name: str, value: Any) -> Any:
        many = isinstance(value, Iterable) and not isinstance(value, str)
        return check_many(name, value, lambda x: _check_of(one)(name, x)) if many else _check_of(one)(name, value)

    return parameter(default, how)


def _check_of(one: Check | dataclasses.Field[Any]) -> Check:
    return one.metadata["check"] if isinstance(one, dataclasses.Field) else one


def layers(default: Iterable[int] | None) -> Any:
    """Different layers; whether a model has them is for ``stages`` to say."""
    return parameter(default, check_layers)


def check_keep(name: str, keep: Keep) -> Keep:
    """``keep`` must be a fraction in (0, 1] or an integer >= 1."""
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        kind = type(keep).__name__
        raise BudgetError(f"{name}={keep!r} is a {kind}; give a fraction in (0, 1] or a number of tokens >= 1")
    if whole and keep < 1:
        raise BudgetError(f"{name}={keep} tokens leaves no visual token; give at least 1, or a fraction in (0, 1]")
    if not whole and not (0.0 < keep <= 1.0):
        raise BudgetError(f"{name}={keep} is not a fraction in (0, 1]; for a number of tokens pass an int")
    return keep


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """``value`` must be one of ``allowed``."""
    if value not in tuple(allowed):
        raise ParameterError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    return value


def check_number(
    name: str, value: float, what: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:
    """``value`` must be a finite number from ``low`` (``above``: not ``low`` itself) to ``high``; ``what`` it is."""
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not (low < value if above else low <= value) or value > high:
        raise ParameterError(f"{name}={value!r} is not a {what}; give a number{_bounds(low, high, above)}")
    return value


def check_integer(
    name: str, value: int, what: str, low: int | None = None, *, error: type[FoveateError] = ParameterError
) -> int:
    """``value`` must be an int, at least ``low``; ``what`` it counts."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (low is not None and value < low):
        raise error(f"{name}={value!r} is not a {what}; give an int{'' if low is None else f' >= {low}'}")
    return value


def check_many(name: str, values: Iterable[Any], one: Callable[[Any], Any]) -> tuple[Any, ...]:
    """``values`` must be a sequence of what ``one`` accepts; it becomes a tuple."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ParameterError(f"{name}={values!r} is not a sequence of numbers; put a single one in brackets")
    return tuple(one(value) for value in values)


def check_layers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """``values`` must be a sequence of different ints; it becomes a tuple."""
    found = check_many(name, values, lambda value: check_integer(name, value, "layer's number"))
    if len(set(found)) < len(found):
        raise ParameterError(f"{name}={found} names a layer twice; name each once")
    return found


def _bounds(low: float, high: float, above: bool) -> str:
    parts: list[str] = []
    if low > -math.inf:
        parts.append(f"above {low:g}" if above else f"from {low:g}" if high < math.inf else f">= {low:g}")
    if high < math.inf:
        parts.append(f"{'at most' if above or not parts else 'to'} {high:g}")
    return " " + (", " if above else " ").join(parts) if parts else ""
