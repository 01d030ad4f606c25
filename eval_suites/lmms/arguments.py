"""What users of lmms-eval write among ``--model_args``: a method, its parameters, and the version of foveate."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

import foveate
from foveate.errors import ParameterError, nearest
from foveate.eval_suites.running.budgets import parse_keep
from foveate.pruners.core import Pruner, create, find
from foveate.pruners.core.control import RandomLike
from foveate.pruners.core.method import PRUNERS

__all__ = ["NO_IMAGE", "check_version", "method", "parameters", "split"]

NO_IMAGE = "no-image"
_CONTROL = "random@"


def check_version(given: Any) -> None:
    """Insist on ``foveate_version``: lmms-eval's answer cache tells runs apart by the model's arguments alone.

    Raises:
        ParameterError: no version, or not the installed one.
    """
    if str(given) != foveate.__version__:
        what = "is missing" if given is None else f"is {given}, but {foveate.__version__} is installed"
        raise ParameterError(
            f"model argument foveate_version {what}: write foveate_version={foveate.__version__}, so that answers "
            "which another version left in lmms-eval's cache (--use_cache) are not taken for this one's"
        )


def parameters(name: str) -> set[str]:
    """Names of the parameters of the method called ``name``, those of methods inside it included."""
    if name.startswith(_CONTROL):
        return {"seed"} | parameters(name.removeprefix(_CONTROL))
    outer, _, inner = name.partition(":")
    if outer == "then":
        return set()
    own = {field.name for field in dataclasses.fields(find(outer))}
    return (own - {"inner"}) | parameters(inner) if inner else own


def split(name: str | None, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are the method's, read, and the others, which are lmms-eval's.

    Raises:
        ParameterError: a method's parameter without the method.
        UnknownNameError: no such method.
    """
    known = set() if name in (None, NO_IMAGE) else parameters(name)
    anybodys = {field.name for cls in PRUNERS.values() for field in dataclasses.fields(cls)}
    if lost := sorted(anybodys.intersection(arguments) - known):
        hint = f"{name} has no such parameter; {nearest(lost[0], known)}" if known else "add pruner=NAME"
        raise ParameterError(f"model argument {lost[0]} is a method's parameter: {hint} (see `foveate list`)")
    own = {key: _value(key, value) for key, value in arguments.items() if key in known}
    return own, {key: value for key, value in arguments.items() if key not in known}


def _value(key: str, value: Any) -> Any:
    """lmms-eval reads numbers and truth values; the rest is text: ``1/9``, ``[7,9,12]``, ``row``."""
    if not isinstance(value, str):
        return value
    if key == "keep":
        return parse_keep(value)[0]
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return tuple(value) if isinstance(value, list) else value


def method(name: str | None, given: Mapping[str, Any]) -> Pruner | None:
    """The method of these arguments; None for the bare model, with pictures or without."""
    if name in (None, NO_IMAGE):
        return None
    if name.startswith(_CONTROL):
        rest = {key: value for key, value in given.items() if key != "seed"}
        return RandomLike(create(name.removeprefix(_CONTROL), **rest), seed=given.get("seed", 0))
    return create(name, **given)
