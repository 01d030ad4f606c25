"""How results are printed: on a terminal, into a pipe, as Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["call_text", "console", "markdown_table", "one_line", "versions", "write"]


def console(width: int = 120) -> Console:
    """The terminal; where there is none, a page as wide as ``COLUMNS`` says, or ``width``."""
    from rich.console import Console

    found = Console(highlight=False)
    if found.is_terminal or "COLUMNS" in os.environ:
        return found
    return Console(highlight=False, width=width)


def call_text(name: str, parameters: Mapping[str, Any]) -> str:
    """``fastv(k=3)``, or the name alone without parameters."""
    shown = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return f"{name}({shown})" if shown else name


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def write(path: str, text: str) -> None:
    """Write ``text`` to a file, or print it where ``path`` is ``-``."""
    if path == "-":
        print(text, end="")
    else:
        Path(path).write_text(text, encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a head, without a newline at the end."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def versions(*facts: Mapping[str, Any], names: Sequence[str] = ("torch", "transformers")) -> str:
    """What results were measured with: ``torch 2.15.0, transformers 5.24.0``.

    Args:
        facts: of each result; where they differ, a package has several versions: ``torch 2.14.1 and 2.15.0``.
        names: of packages; those that no facts name are left out.
    """
    found = {name: dict.fromkeys(str(one[name]) for one in facts if one.get(name)) for name in names}
    return ", ".join(f"{name} {' and '.join(different)}" for name, different in found.items() if different)
