"""A method with its parameters in a small YAML file, as ``foveate tune`` writes it and ``foveate.attach`` reads it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import ParameterError
from foveate.pruners.core.method import Pruner, create

__all__ = ["ENDINGS", "Preset", "is_preset"]

ENDINGS = (".yaml", ".yml")
_KEYS = {"method", "parameters", "positions", "tuned"}


def is_preset(name: Any) -> bool:
    """Whether ``name`` stands for a preset's file, by its ending."""
    return isinstance(name, (str, os.PathLike)) and os.fspath(name).lower().endswith(ENDINGS)


@dataclass(frozen=True)
class Preset:
    """A method, ready to attach.

    Attributes:
        pruner: the method.
        positions: as for :func:`foveate.attach`.
        tuned: how it was found, for people.
    """

    pruner: Pruner
    positions: str = "auto"
    tuned: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str], **params: Any) -> Preset:
        """Read a preset; ``params`` replace what it says.

        The file is data only: it names a registered method and plain values (YAML's safe subset), and can run nothing.

        Raises:
            ParameterError: no such file, or not a preset.
            UnknownNameError: it names a method or a parameter that does not exist.
            BudgetError: it sets an impossible budget.
        """
        import yaml

        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ParameterError(f"preset {path} cannot be read: {error.strerror}; `foveate tune` writes one") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ParameterError(f"preset {path} is no plain YAML ({reason}); `foveate tune` writes one") from None
        if not isinstance(plain, dict) or not isinstance(plain.get("method"), str):
            raise ParameterError(f"preset {path} names no method; it needs a line such as `method: fastv`")
        if unknown := sorted(map(str, plain.keys() - _KEYS)):
            raise ParameterError(
                f"preset {path} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}"
            )
        parameters = plain.get("parameters") or {}
        if not isinstance(parameters, dict) or is_preset(plain["method"]):
            raise ParameterError(f"preset {path}: `method` is a method's name and `parameters` maps names to values")
        pruner = create(plain["method"], **(_values(parameters) | params))
        return cls(pruner, str(plain.get("positions", "auto")), dict(plain.get("tuned") or {}))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file.

        Raises:
            ParameterError: a file cannot hold one of the parameters.
        """
        import yaml

        plain: dict[str, Any] = {**_plain(self.pruner), "positions": self.positions}
        if self.tuned:
            plain["tuned"] = json.loads(json.dumps(self.tuned))  # torch's version is not plain text, for one
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
        Path(path).write_text(text, encoding="utf-8")


def _plain(pruner: Pruner) -> dict[str, Any]:
    """Name and parameters; inner methods the same way."""
    parameters = {}
    for f in dataclasses.fields(pruner):
        value = getattr(pruner, f.name)
        if isinstance(value, Pruner):
            value = _plain(value)
        elif isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, (type(None), bool, int, float, str, list, dict)):
            raise ParameterError(
                f"{pruner.name}: {f.name}={value!r} cannot be written to a preset; attach it from Python"
            )
        parameters[f.name] = value
    return {"method": pruner.name.partition(":")[0], "parameters": parameters}


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in parameters.items():
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            value = create(value["method"], **_values(value.get("parameters") or {}))
        values[name] = tuple(value) if isinstance(value, list) else value
    return values
