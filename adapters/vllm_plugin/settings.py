"""What a ``foveate`` entry says: in ``--hf-overrides`` for the engine, in ``mm_processor_kwargs`` for one request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.errors import ParameterError
from foveate.pruners.core import Pruner, create

SEPARATORS = ("keep", "drop")
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """A configured method.

    Attributes:
        pruner: the method.
        separators: ``"keep"`` all newline embeddings of AnyRes pictures or ``"drop"`` them; None: as the method says,
            and ``"keep"`` where it would keep those of rows that keep a token, whose number nobody knows beforehand.
    """

    pruner: Pruner
    separators: str | None = None


def merged(engine: Any, request: Any = None) -> dict[str, Any] | None:
    """The entry that holds for a request: the engine's, with what the request changes. None: no pruning.

    A request that names a method starts from that method's defaults; one that does not changes the engine's.
    ``false`` (or null) switches pruning off for the request.

    Raises:
        ParameterError: an entry of the wrong type, or a request that changes a method which nobody chose.
    """
    engine = _entry(engine, "hf_overrides")
    if request is None:
        return engine if "pruner" in engine else None
    if request is False:
        return None
    request = _entry(request, "mm_processor_kwargs")
    whole = request if "pruner" in request else {**engine, **request}
    if "pruner" not in whole:
        raise ParameterError(
            f'foveate: {request!r} names no pruner, and the engine has none; add "pruner" (see `foveate list`)'
        )
    return dict(whole)


def _entry(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ParameterError(
            f"foveate={given!r} in {where} is not a JSON object; give for example "
            '{"foveate": {"pruner": "hiprune", "keep": 0.25}}'
        )
    return dict(given)


def canonical(entry: Entry | None) -> str:
    """The entry as text, the same for equal entries.

    Raises:
        ParameterError: it holds more than JSON can say.
    """
    try:
        return json.dumps(entry, sort_keys=True)
    except TypeError:
        raise ParameterError(f"foveate: {entry!r} holds more than JSON can say") from None


def parse(entry: Entry) -> Settings:
    """The method that a merged entry describes.

    Raises:
        FoveateError: unknown method or parameter, bad value.
    """
    given = json.loads(canonical(entry))
    name, separators = given.pop("pruner"), given.pop("separators", None)
    if not isinstance(name, str):
        raise ParameterError(f"foveate: pruner={name!r} is not a method's name; see `foveate list`")
    if separators is not None and separators not in SEPARATORS:
        raise ParameterError(f"foveate: separators={separators!r} is not one of {', '.join(map(repr, SEPARATORS))}")
    return Settings(create(name, **given), separators)


def identity(entry: Entry | None, version: str) -> str:
    """What tells features of one picture under different settings apart, for caches: method, parameters, version."""
    if entry is None:
        return f"foveate {version}: none"
    settings = parse(entry)
    return f"foveate {version}: {settings.pruner.name} {settings.pruner.parameters()} separators={settings.separators}"
