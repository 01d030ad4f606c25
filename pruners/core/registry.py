"""Names of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from foveate.errors import ParameterError, UnknownNameError, nearest
from foveate.pruners.core.method import Pruner

PRUNERS: dict[str, type[Pruner]] = {}
P = TypeVar("P", bound=type[Pruner])


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a method known under ``name``."""

    def add(cls: P) -> P:
        if name in PRUNERS:
            raise ParameterError(f"the method name {name!r} is already taken by {PRUNERS[name].__qualname__}")
        cls.name = name
        PRUNERS[name] = cls
        return cls

    return add


def find(name: str) -> type[Pruner]:
    """The method called ``name``.

    Raises:
        UnknownNameError: there is none; the message suggests the nearest.
    """
    if name not in PRUNERS:
        raise UnknownNameError(f"unknown method {name!r}; {nearest(name, PRUNERS)}")
    return PRUNERS[name]


def create(method: str | Pruner | type[Pruner], **params: Any) -> Pruner:
    """Turn a name, a class or a ready method into a method with parameters ``params``.

    Names may compose: ``"pospad:random"`` is PosPad around Random, each taking the parameters it knows, the outer one first;
    ``"then:divprune+fastv"`` is one after the other; ``"random@fastv"`` is FastV's control (:class:`RandomLike`).

    Raises:
        UnknownNameError: no such method or parameter.
        ParameterError: parameters given beside a ready method, or a method around another that goes around none.
    """
    if isinstance(method, str) and method.startswith("random@"):
        from foveate.pruners.core.control import RandomLike

        return RandomLike(create(method.removeprefix("random@"), **params))
    if isinstance(method, str) and ":" in method:
        return _composed(*method.split(":", 1), params)
    if isinstance(method, Pruner):
        if params:
            raise ParameterError(f"{method} is configured already; drop {', '.join(params)} or use dataclasses.replace")
        return method
    cls = find(method) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise ParameterError(f"{method!r} is no method: give a name (see `foveate list`) or a Pruner")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in params:
        if name not in known:
            own = "it has a schedule of its own in place of a budget; " if name == "keep" else ""
            raise UnknownNameError(f"{cls.name} has no parameter {name!r}; {own}{nearest(name, known)}")
    try:
        return cls(**params)
    except TypeError as error:  # a value that cannot even be compared
        given = ", ".join(f"{name}={value!r}" for name, value in params.items())
        raise ParameterError(
            f"{cls.name} cannot be built with {given}: {error}; see `foveate show {cls.name}`"
        ) from None


def _composed(outer: str, inner: str, params: dict[str, Any]) -> Pruner:
    """The method of a name such as ``outer:inner``."""
    if outer == "then":
        from foveate.pruners.core.compose import Then

        if params:
            raise ParameterError(f"then:{inner} takes no parameters; build Then(...) from configured methods instead")
        return Then(*(create(name) for name in inner.split("+")))
    cls = find(outer)
    known = {f.name for f in dataclasses.fields(cls)} - {"inner"}
    if not hasattr(cls, "inner"):
        raise ParameterError(f"{outer}:{inner}: {outer} goes around no other method; methods that do: pospad, then")
    own = {name: value for name, value in params.items() if name in known}
    rest = {name: value for name, value in params.items() if name not in known}
    return create(outer, inner=create(inner, **rest), **own)
