"""Statement: the tables of slow cases name tests that exist, and leave every other test a quick case."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import slow


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function of a test file, with the file's name."""
    return [
        (file.name, node)
        for file in sorted(Path(__file__).parent.rglob("test_*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]


def test_every_name_is_a_test(functions):
    found = {node.name for _, node in functions} | {f"{file}::{node.name}" for file, node in functions}
    names = [*slow.ALONE, *slow.FIRST, *slow.CROSSED]
    assert len(names) == len(set(names)), "a test stands in two tables"
    missing = sorted(set(names) - found)
    assert not missing, f"tests/slow.py names tests that are gone; rename or remove them there: {missing}"


def test_every_fixture_is_used(functions):
    used = {argument.arg for _, node in functions if node.name.startswith("test_") for argument in node.args.args}
    assert slow.FIXTURES.keys() <= used


def case(name: str, **params: object) -> SimpleNamespace:
    marks: list[pytest.Mark] = []
    return SimpleNamespace(
        path=Path("test_x.py"),
        name=f"{name}[{params}]",
        originalname=name,
        fixturenames=[*params],
        callspec=SimpleNamespace(params=params),
        marks=marks,
        add_marker=marks.append,
    )


@pytest.mark.parametrize(
    ("table", "quick"), [("ALONE", []), ("FIRST", ["ax"]), ("CROSSED", ["ax", "ay", "az", "bx"]), (None, None)]
)
def test_what_stays_quick(table, quick, monkeypatch):
    crossing = [case("test_it", letter=one, other=two) for one, two in itertools.product("ab", "xyz")]
    if table is not None:
        monkeypatch.setitem(getattr(slow, table), "test_it", "why")
    slow.mark_slow(crossing)
    stays = ["".join(item.callspec.params.values()) for item in crossing if not item.marks]
    assert stays == (["ax", "ay", "az", "bx", "by", "bz"] if quick is None else quick)


def test_a_name_may_mean_the_test_of_one_file(monkeypatch):
    monkeypatch.setitem(slow.ALONE, "test_y.py::test_it", "why")
    items = [case("test_it"), case("test_it")]
    items[1].path = Path("test_y.py")
    slow.mark_slow(items)
    assert [bool(item.marks) for item in items] == [False, True]


def test_a_fixture_makes_its_tests_slow():
    items = [case("test_page", browser=1), case("test_other", loaded=1)]
    slow.mark_slow(items)
    assert [bool(item.marks) for item in items] == [True, False]
