"""Statement: imports between the folders go one way, demo -> eval_suites -> adapters -> pruners -> cuda, `foveate` on top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.pruners import PRUNERS

ROOT = Path(__file__).parents[1]
ORDER = ("cuda", "pruners", "adapters", "eval_suites", "demo")
# errors.py is everybody's; the command line and its page of methods stand above the folders, inside the facade
FREE = {"errors"}
FACADE = {"cli", "registry_view", "attach", "__version__"}
# what may reach up, late (inside a function), and why
EXCEPTIONS = {
    ("eval_suites/page.py", "registry_view"),  # the method cards of the web page are those of `foveate show`
    ("eval_suites/speed.py", "cli"),  # `python -m foveate.eval_suites.speed` is `foveate speed`
}


def imported(file: Path, late: bool = True) -> Iterator[str]:
    """Names below `foveate` that a file imports: first component; without `late`, at module level alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "foveate":
                yield rest.partition(".")[0]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    below = {*ORDER[: ORDER.index(folder) + 1], *FREE}
    for file in files(folder):
        name = file.relative_to(ROOT).as_posix()
        upward = {head for head in imported(file) if head in {*ORDER, *FACADE} - below}
        assert all((name, head) in EXCEPTIONS for head in upward), f"{name} imports {sorted(upward)}"


def test_exceptions_are_still_needed_and_late():
    for name, head in EXCEPTIONS:
        assert head in imported(ROOT / name), f"{name} no longer imports {head}"
        assert head not in imported(ROOT / name, late=False)


def test_no_adapter_names_a_method():
    """Neither by import nor by name; "random" and "grid" are words of other things as well."""
    modules = {method.__module__.rpartition(".")[2] for method in PRUNERS.values()}
    classes = {method.__name__ for method in PRUNERS.values()}
    for file in files("adapters"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foveate.pruners"):
                assert node.module.rpartition(".")[2] not in modules, f"{where} imports {node.module}"
                assert not classes & {alias.name for alias in node.names}, where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in PRUNERS.keys() - {"grid", "random"}, f"{where} names {node.value}"


def test_every_module_says_what_lives_there():
    for folder in (*ORDER, "foveate", "tests"):
        for file in files(folder):
            text = file.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), (
                f"{file.relative_to(ROOT)} has no first lines"
            )
