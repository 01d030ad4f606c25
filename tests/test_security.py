"""Statements of SECURITY.md that can be read off the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in ("foveate", "pruners", "adapters", "cuda", "eval_suites", "demo")
    for file in (ROOT / folder).rglob("*.py")
)


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file with the dotted name that it goes to."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_runs_or_unpickles_what_it_reads(file):
    for name, call in calls(file):
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen"}, name
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), name
        assert name not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}, name
        assert keyword(call, "shell") is None, f"{name} in a shell"
        assert keyword(call, "trust_remote_code") is None, name
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", f"line {call.lineno} may unpickle anything"
        if name == "np.load":
            assert keyword(call, "allow_pickle") in (None, "False"), f"line {call.lineno}"


def test_the_check_sees_what_it_looks_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\ntorch.load('x', weights_only=False)\neval('1')\n")
    with pytest.raises(AssertionError):
        test_nothing_runs_or_unpickles_what_it_reads(bad)
